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
from planner.cluster import Cluster, SharedHost
from planner.device import GIB, Device
from planner.layout import lay_out
from planner.shape import StepShape, decode, of_chunks

MAX_STEP_TOKENS = 512
"""Of a router that is told nothing else."""

PRODUCT_LEGS = ("qkv", "out", "head")
ATTEND_LEGS = ("attention",)
ROW_LEGS = ("embed", "norm", "sample")
ROUTER_LEGS = ("gate", "dispatch", "combine")
EXPERT_LEGS = ("expert", "queue")
WIRE_LEGS = ("wire", "attention_wire", "worker")
"""The legs of the router's report that make one leg of the model; what is in none of them is its `step`. `worker` is
what an attention worker does beside its stages: reading messages, handing over to its device."""

ALL_LEGS = (*PRODUCT_LEGS, *ATTEND_LEGS, *ROW_LEGS, *ROUTER_LEGS, *EXPERT_LEGS, *WIRE_LEGS)


@dataclasses.dataclass(frozen=True)
class Observation:
    """One load on one topology, all on one machine.

    device: the machine. expert_workers: 0 is fused. shapes: of the steps, each with how many there were. requests:
    whose beginning and end are in the time. legs, step: seconds, all of them. spread: the longest of its runs over the
    shortest.
    """

    name: str
    config: ModelConfig
    device: Device
    expert_workers: int
    shapes: tuple[tuple[float, StepShape], ...]
    legs: Mapping[str, float]
    step: float
    requests: int = 0
    lanes: int = 1
    spread: float = 1.0

    def leg(self, *names: str) -> float:
        """Sum of some legs."""
        return sum(self.legs.get(name, 0.0) for name in names)

    @property
    def other(self) -> float:
        """The step less all that is known of it."""
        return max(0.0, self.step - self.leg(*ALL_LEGS))

    @property
    def cluster(self) -> Cluster:
        """What was measured, as it is planned: every role on this machine, the expert workers with equal parts of its
        cores, as `grokmoe up` shares them out."""
        config, workers = self.config, max(1, self.expert_workers)
        room = config.num_experts * config.num_layers
        cores = self.device.cores
        return Cluster(
            config=config,
            dtype="bfloat16",
            expert_dtype="bfloat16",
            attention=self.device,
            attention_workers=1,
            routers=1,
            lanes=self.lanes,
            layout=lay_out([self.device] * workers, [room] * workers, config.num_experts, config.num_layers),
            copies=1,
            link=1.0 if self.expert_workers else 0.0,
            kv_gib=1.0,
            host=SharedHost(cores, max(1, cores // workers)) if self.expert_workers else None,
        )


def machine(limits: Mapping[str, Any], cores: int) -> Device:
    """What benchmarks/limits has measured of a machine. Raises KeyError, IndexError, TypeError for anything else."""
    points = [(float(size), float(rate)) for size, rate in limits["bandwidth"]]
    return Device(
        name="measured",
        kind="cpu",
        memory=points[-1][0] / GIB,
        bandwidth=points[-1][1],
        flops={"bfloat16": float(limits["flops"])},
        price=0.0,
        cores=cores,
        caches=tuple(points),
        cold=float(limits["cold"]),
    )


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
        told = json.loads(Path(path).read_text().strip().splitlines()[-1])
        devices = {name: machine(limits, int(told["threads"])) for name, limits in told["limits"].items()}
        return [_step_observation(row, config, devices[row["topology"]]) for row in told["rows"]]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not what benchmarks/step writes: {error!r}") from error


def _step_observation(row: Mapping[str, Any], config: ModelConfig, device: Device) -> Observation:
    topology = row["topology"]
    return Observation(
        f"{topology}, {row['name']}",
        config,
        device,
        0 if topology == "fused" else int(topology.split()[1]),
        shapes_of(row["batch"], row["prompt"], row["new"]),
        {leg: found["ms"] / 1e3 for leg, found in row["legs"].items() if leg != "other"},
        row["ms"] / 1e3,
        requests=1 if row["new"] == 1 else 0,
    )


def read_result(path: str | Path, config: ModelConfig, device: Device, expert_workers: int) -> Observation:
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
    shape = StepShape(round(rows), round(draws), round(draws), rows * context, draws * context)
    return Observation(str(path), config, device, expert_workers, ((1.0, shape),), legs, steps["mean"])
