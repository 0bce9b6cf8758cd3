"""The hot paths that are guarded: they run, and what is counted of them is the same each time."""

from __future__ import annotations

from benchmarks.check import paths
from benchmarks.check.__main__ import hot_paths, measure
from benchmarks.check.baseline import Baseline, Unit, Verdict, compare


def test_counts_repeat_exactly() -> None:
    """And are all of those that the repository's baseline has: none has been forgotten, none is new."""
    hot = hot_paths()
    first, second = measure(*hot, rounds=0), measure(*hot, rounds=0)
    assert first == second
    assert all(figure.value > 0 for figure in first)
    verdicts = {each.verdict for each in compare(Baseline.read().without(Unit.RATIO), first)}
    assert not verdicts & {Verdict.NEW, Verdict.GONE}


def test_scheduling_computes_a_token_of_every_sequence() -> None:
    step = paths.Scheduling(16).run()
    assert len(step.chunks) == step.num_decodes == 16


def test_plans_and_rows_come_back_as_they_were() -> None:
    assert paths.plan_there_and_back() == paths.plan_of(paths.MANY)
    assert len(paths.rows_messages(4096, 1024)) > 1
