"""Costs as a JSON file, so that they are fitted once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from grokmoe.errors import ConfigError
from planner.costs import AttentionCosts, Costs, ExpertCosts, RouterCosts


def write_costs(path: str | Path, costs: Costs) -> None:
    """As `read_costs` reads it."""
    Path(path).write_text(json.dumps(dataclasses.asdict(costs), indent=1) + "\n")


def read_costs(path: str | Path) -> Costs:
    """Raises ConfigError for what is no such file."""
    try:
        raw = json.loads(Path(path).read_text())
        return Costs(
            **{
                **raw,
                "attention": {kind: AttentionCosts(**fields) for kind, fields in raw["attention"].items()},
                "experts": {kind: ExpertCosts(**fields) for kind, fields in raw["experts"].items()},
                "router": RouterCosts(**raw["router"]),
            }
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"costs {path}: {error}") from error
