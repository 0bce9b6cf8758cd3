"""Costs as a JSON file, so that they are fitted once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from grokmoe.errors import ConfigError
from planner.costs import Costs, Efficiency


def write_costs(path: str | Path, costs: Costs) -> None:
    """As `read_costs` reads it."""
    Path(path).write_text(json.dumps(dataclasses.asdict(costs), indent=1) + "\n")


def read_costs(path: str | Path) -> Costs:
    """Raises ConfigError for what is no such file."""
    try:
        raw = json.loads(Path(path).read_text())
        for role in ("attention", "experts"):
            raw[role] = {kind: Efficiency(**fields) for kind, fields in raw[role].items()}
        return Costs(**raw)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"costs {path}: {error}") from error
