"""Steps that were measured: from the last line of benchmarks/step, and from a load test's result.json."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grokmoe.errors import ConfigError
from grokmoe.model_config import ModelConfig
from planner.shape import StepShape, decode, of_chunks

MAX_STEP_TOKENS = 512
"""Of a router that is told nothing else."""

ATTENTION_LEGS = ("embed", "norm", "qkv", "attention", "out", "head", "sample", "worker")
ROUTER_LEGS = ("gate", "dispatch", "combine")
EXPERT_LEGS = ("expert", "queue")
WIRE_LEGS = ("wire", "attention_wire")
"""The legs of the router's report that make one leg of the model; what is in none of them is its `step`."""


@dataclasses.dataclass(frozen=True)
class Observation:
    """One load on one topology.

    expert_workers: 0 is fused. shapes: of the steps, each with how many there were. legs, step: seconds, all of them.
    """

    name: str
    config: ModelConfig
    expert_workers: int
    shapes: tuple[tuple[float, StepShape], ...]
    legs: Mapping[str, float]
    step: float

    def leg(self, *names: str) -> float:
        """Sum of some legs."""
        return sum(self.legs.get(name, 0.0) for name in names)

    @property
    def other(self) -> float:
        """The step less all that is known of it."""
        known = self.leg(*ATTENTION_LEGS, *ROUTER_LEGS, *EXPERT_LEGS, *WIRE_LEGS)
        return max(0.0, self.step - known)


def shapes_of(batch: int, prompt: int, new: int) -> tuple[tuple[float, StepShape], ...]:
    """The steps of one unit of benchmarks/step: of a prompt its chunks, of a decode one in the middle."""
    if new > 1:
        return ((1.0, decode(batch, prompt + new / 2)),)
    starts = range(0, prompt, MAX_STEP_TOKENS)
    ends = [min(prompt, start + MAX_STEP_TOKENS) for start in starts]
    return tuple((1.0, of_chunks([(start, end, end == prompt)])) for start, end in zip(starts, ends, strict=True))


def read_steps(path: str | Path, config: ModelConfig) -> list[Observation]:
    """The last line of the output of benchmarks/step. Raises ConfigError."""
    try:
        rows = json.loads(Path(path).read_text().strip().splitlines()[-1])["rows"]
        return [_step_observation(row, config) for row in rows]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not what benchmarks/step writes: {error!r}") from error


def _step_observation(row: Mapping[str, Any], config: ModelConfig) -> Observation:
    topology = row["topology"]
    return Observation(
        f"{topology}, {row['name']}",
        config,
        0 if topology == "fused" else int(topology.split()[1]),
        shapes_of(row["batch"], row["prompt"], row["new"]),
        {leg: found["ms"] / 1e3 for leg, found in row["legs"].items()},
        row["ms"] / 1e3,
    )


def read_result(path: str | Path, config: ModelConfig, expert_workers: int) -> Observation:
    """A load test's result.json with the router's metrics in it. Raises ConfigError when it has none."""
    try:
        result = json.loads(Path(path).read_text())
        endpoints: Sequence[Mapping[str, Any]] = list(result["server_metrics"]["endpoints"].values())
        histograms = next(e["histograms"] for e in endpoints if "grokmoe_step_seconds" in e.get("histograms", {}))
        steps = histograms["grokmoe_step_seconds"]
        rows = histograms["grokmoe_step_tokens"]["mean"]
        duration, completed = result["duration"], result["completed"]
        draws = min(rows, result["output_throughput"] * duration / steps["count"])
        context = (result["total_input_tokens"] + result["total_output_tokens"] / 2) / completed
    except (OSError, ValueError, KeyError, StopIteration, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{path}: no result with a router's metrics (--metrics-url): {error!r}") from error
    legs = {
        match[1]: found["mean"]
        for name, found in histograms.items()
        if (match := re.fullmatch(r'grokmoe_leg_seconds\{leg="(\w+)"\}', name))
    }
    shape = StepShape(round(rows), round(draws), rows * context, draws * context)
    return Observation(str(path), config, expert_workers, ((1.0, shape),), legs, steps["mean"])
