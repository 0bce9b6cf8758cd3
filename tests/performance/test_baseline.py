"""Figures held against a baseline."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.check.baseline import FAILURES, PYTHON, Baseline, Figure, Unit, Verdict, compare
from benchmarks.check.counting import calls_of, operations_of


def verdict(before: float | None, now: float | None, unit: Unit = Unit.CALLS, python: str = PYTHON) -> Verdict:
    values = {} if before is None else {Figure("path", unit, 0).key: before}
    figures = [] if now is None else [Figure("path", unit, now)]
    (comparison,) = compare(Baseline(values, python), figures)
    return comparison.verdict


@pytest.mark.parametrize(
    ("before", "now", "unit", "expected"),
    [
        (1000, 1000, Unit.CALLS, Verdict.SAME),
        (1000, 1029, Unit.CALLS, Verdict.SAME),
        (1000, 1031, Unit.CALLS, Verdict.WORSE),
        (1000, 900, Unit.CALLS, Verdict.BETTER),
        (9, 9, Unit.OPERATIONS, Verdict.SAME),
        (9, 10, Unit.OPERATIONS, Verdict.WORSE),
        (9, 8, Unit.OPERATIONS, Verdict.BETTER),
        (3.0, 5.9, Unit.RATIO, Verdict.SAME),
        (3.0, 6.1, Unit.RATIO, Verdict.WORSE),
        (None, 5, Unit.CALLS, Verdict.NEW),
        (5, None, Unit.CALLS, Verdict.GONE),
    ],
)
def test_verdicts(before: float | None, now: float | None, unit: Unit, expected: Verdict) -> None:
    assert verdict(before, now, unit) is expected


def test_calls_counted_by_another_python_are_compared_loosely_and_nothing_else_is() -> None:
    assert verdict(1000, 1200, Unit.CALLS, "2.7") is Verdict.SAME
    assert verdict(1000, 1300, Unit.CALLS, "2.7") is Verdict.WORSE
    assert verdict(10, 11, Unit.OPERATIONS, "2.7") is Verdict.WORSE


def test_what_is_written_is_read_back_and_is_the_same(tmp_path: Path) -> None:
    figures = [Figure("a", Unit.CALLS, 12), Figure("a", Unit.RATIO, 1.5)]
    Baseline.of(figures).write(tmp_path / "file.json")
    baseline = Baseline.read(tmp_path / "file.json")
    assert {each.verdict for each in compare(baseline, figures)} == {Verdict.SAME}
    assert baseline.without(Unit.RATIO).values == {"a: function calls": 12}
    assert Baseline.read(tmp_path / "none.json").values == {}


def test_the_repositorys_baseline_guards_something() -> None:
    baseline = Baseline.read()
    units = {unit for unit in Unit if any(key.endswith(f": {unit}") for key in baseline.values)}
    assert units == set(Unit)
    assert set(FAILURES) == {Verdict.WORSE, Verdict.GONE}


def test_function_calls_are_counted() -> None:
    def once() -> None:
        len(())

    def four_times() -> None:
        for _ in range(4):
            once()

    def nothing() -> None:
        pass

    assert sys.getprofile() is None
    empty = calls_of(nothing)
    assert calls_of(four_times) - empty == 8
    assert [calls_of(four_times) for _ in range(5)] == [empty + 8] * 5
    assert sys.getprofile() is None


def test_operations_and_what_they_allocate_are_counted() -> None:
    x = torch.ones(10, 4)
    assert operations_of(lambda: x + 1) == (1, 160)
    assert operations_of(lambda: x.view(4, 10)) == (1, 0)
    assert operations_of(lambda: x.add_(1)) == (1, 0)
    assert operations_of(lambda: (x + 1) * 2) == (2, 320)
