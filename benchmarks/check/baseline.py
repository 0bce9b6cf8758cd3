"""What was measured before, in a file of the repository, and whether what is measured now is within tolerance of it."""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
from pathlib import Path

FILE = Path(__file__).with_name("baseline.json")

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class Unit(enum.StrEnum):
    """What a figure is."""

    CALLS = "function calls"
    OPERATIONS = "torch operations"
    BYTES = "bytes allocated"
    MESSAGES = "messages"
    RATIO = "times the yardstick"


TOLERANCE = {
    Unit.CALLS: 0.03,
    Unit.OPERATIONS: 0.0,
    Unit.BYTES: 0.02,
    Unit.MESSAGES: 0.0,
    Unit.RATIO: 1.0,
}
"""Share by which a figure may exceed the baseline. Counts repeat exactly, and a little room lets small changes pass;
times do not, and differ between processors: only a path that has become twice as slow is noticed by its time."""

OTHER_PYTHON = 0.25
"""Share for function calls when the baseline is another version's: they differ in what they count as a call."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measurement of one path. Less is better."""

    path: str
    unit: Unit
    value: float

    @property
    def key(self) -> str:
        """Its name in the file."""
        return f"{self.path}: {self.unit}"


@dataclasses.dataclass(frozen=True)
class Baseline:
    """values: by key. python: the version they were counted with."""

    values: dict[str, float]
    python: str = PYTHON

    @classmethod
    def read(cls, file: Path = FILE) -> Baseline:
        """An empty one if there is no file."""
        if not file.exists():
            return cls({})
        raw = json.loads(file.read_text())
        return cls(raw["values"], raw["python"])

    @classmethod
    def of(cls, figures: list[Figure]) -> Baseline:
        """What is measured now."""
        return cls({figure.key: figure.value for figure in figures})

    def write(self, file: Path = FILE) -> None:
        """Replaces the file."""
        file.write_text(json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n")

    def without(self, unit: Unit) -> Baseline:
        """The same but for figures that are not measured this time."""
        kept = {key: value for key, value in self.values.items() if not key.endswith(f": {unit}")}
        return Baseline(kept, self.python)

    def tolerance(self, unit: Unit) -> float:
        """Share by which a figure may exceed what is here."""
        return OTHER_PYTHON if unit is Unit.CALLS and self.python != PYTHON else TOLERANCE[unit]


class Verdict(enum.StrEnum):
    """WORSE and GONE are failures: what is no longer measured guards nothing."""

    SAME = "within tolerance"
    BETTER = "better: --update"
    WORSE = "WORSE"
    NEW = "new: --update"
    GONE = "GONE"


FAILURES = (Verdict.WORSE, Verdict.GONE)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A figure beside the baseline's; None where there is none."""

    key: str
    before: float | None
    now: float | None
    verdict: Verdict


def compare(baseline: Baseline, figures: list[Figure]) -> list[Comparison]:
    """All figures, and what the baseline has beside."""
    found = []
    for figure in figures:
        before = baseline.values.get(figure.key)
        verdict = Verdict.NEW if before is None else _judge(before, figure.value, baseline.tolerance(figure.unit))
        found.append(Comparison(figure.key, before, figure.value, verdict))
    gone = set(baseline.values) - {figure.key for figure in figures}
    return found + [Comparison(key, baseline.values[key], None, Verdict.GONE) for key in sorted(gone)]


def _judge(before: float, now: float, tolerance: float) -> Verdict:
    if now > before * (1 + tolerance):
        return Verdict.WORSE
    return Verdict.BETTER if now < before / (1 + tolerance) else Verdict.SAME
