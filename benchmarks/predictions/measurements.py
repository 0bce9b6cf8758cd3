"""The file of measurements: JSON, one object per load and topology."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.predictions.configurations import Topology, Traffic
from benchmarks.step.loads import Load

MOST_FOREIGN = 0.05
"""Share of the machine that other programs may use during a measurement that counts."""


@dataclasses.dataclass(frozen=True)
class Conditions:
    """limits: of the machine, measured just before (benchmarks/limits.py). cores: that it has. foreign: share of it
    that other programs used meanwhile. date, machine: when and where."""

    limits: Mapping[str, Any]
    cores: int
    foreign: float
    date: str
    machine: str

    @property
    def is_disturbed(self) -> bool:
        """Whether others had so much of the machine that the measurement says little of the program."""
        return self.foreign > MOST_FOREIGN


@dataclasses.dataclass(frozen=True)
class Steps:
    """Medians of some runs. seconds: of one unit of the load. legs: the same by leg. spread: longest over shortest."""

    topology: Topology
    load: Load
    seconds: float
    legs: Mapping[str, float]
    spread: float
    conditions: Conditions


@dataclasses.dataclass(frozen=True)
class Latencies:
    """Of one load of requests, milliseconds and tokens/s, by the names of `grokmoe loadtest`."""

    topology: Topology
    traffic: Traffic
    figures: Mapping[str, float]
    conditions: Conditions


@dataclasses.dataclass(frozen=True)
class Measured:
    """All that there is."""

    steps: tuple[Steps, ...] = ()
    latencies: tuple[Latencies, ...] = ()

    def with_new(self, other: Measured) -> Measured:
        """The topologies of the other as it has them, all others as they are here."""
        return Measured(
            (*(each for each in self.steps if each.topology not in other.topologies), *other.steps),
            (*(each for each in self.latencies if each.topology not in other.topologies), *other.latencies),
        )

    @property
    def undisturbed(self) -> Measured:
        """What counts."""
        return Measured(
            tuple(each for each in self.steps if not each.conditions.is_disturbed),
            tuple(each for each in self.latencies if not each.conditions.is_disturbed),
        )

    @property
    def topologies(self) -> set[Topology]:
        """Those that are done."""
        return {each.topology for each in (*self.steps, *self.latencies)}


def read(path: Path) -> Measured:
    """Nothing, if there is no such file."""
    if not path.exists():
        return Measured()
    raw = json.loads(path.read_text())
    return Measured(
        tuple(Steps(**_known(each, load=Load)) for each in raw["steps"]),
        tuple(Latencies(**_known(each, traffic=Traffic)) for each in raw["latencies"]),
    )


def _known(raw: dict[str, Any], **types: Any) -> dict[str, Any]:
    types |= {"topology": Topology, "conditions": Conditions}
    return {name: types[name](**value) if name in types else value for name, value in raw.items()}


def write(path: Path, measured: Measured) -> None:
    """Beside it and renamed, so that an end in the middle loses nothing."""
    parts = [
        f'"{name}": [\n' + ",\n".join(json.dumps(_rounded(dataclasses.asdict(each))) for each in listed) + "\n]"
        for name, listed in (("steps", measured.steps), ("latencies", measured.latencies))
    ]
    beside = path.with_suffix(".part")
    beside.write_text("{" + ",\n".join(parts) + "}\n")
    os.replace(beside, path)


def _rounded(value: Any) -> Any:
    """To five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
