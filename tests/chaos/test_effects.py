"""What the chaos programs say of a fault: which waits, losses and changes are its doing."""

from __future__ import annotations

import math

from benchmarks.chaos.campaign import Span, effect_of
from benchmarks.chaos.load import Job, Outcome, make_jobs
from benchmarks.chaos.report import errors, rows

SPAN = Span("kill", "expert", 10.0, 12.0, 0.5)
NOW = 100.0


def test_the_longest_wait_that_touches_the_span() -> None:
    before = Outcome(0.0, [1.0, 9.0], end=9.5)
    across = Outcome(8.0, [9.8, 10.4, 10.5], end=10.5)
    after = Outcome(12.5, [13.0, 20.0], end=20.0)
    effect = effect_of(SPAN, math.inf, [before, across, after], NOW)
    assert math.isclose(effect.stall, 0.6)
    assert effect.num_requests == 1


def test_what_the_next_fault_adds_to_a_wait_does_not_count() -> None:
    effect = effect_of(SPAN, 13.0, [Outcome(9.0, [11.9, 20.0], end=21.0)], NOW)
    assert math.isclose(effect.stall, 1.1)


def test_a_stream_that_still_waits_counts_to_now() -> None:
    effect = effect_of(SPAN, math.inf, [Outcome(9.0, [9.5])], NOW)
    assert effect.stall == NOW - 9.5


def test_who_never_got_a_token_waited_for_the_first() -> None:
    effect = effect_of(SPAN, math.inf, [Outcome(10.5, [], end=11.5, error="Unavailable: gone")], NOW)
    assert (effect.stall, effect.first_wait, effect.num_lost) == (0.0, 1.0, 1)


def test_what_goes_wrong_counts_where_it_happened() -> None:
    lost = Outcome(9.0, [9.5], end=12.5, error="InternalError: bug")
    changed = Outcome(9.0, [9.5, 10.5], end=30.0, changed_at=10.5)
    here = effect_of(SPAN, 13.0, [lost, changed], NOW)
    assert (here.num_requests, here.num_lost, here.num_changed) == (2, 1, 1)
    later = effect_of(Span("hang", "expert", 13.0, 15.0, 0.0), math.inf, [lost, changed], NOW)
    assert (later.num_requests, later.num_lost, later.num_changed) == (1, 0, 0)


def test_rows_sum_up_a_kind() -> None:
    quiet = effect_of(SPAN, math.inf, [Outcome(9.0, [9.5, 10.5], end=11.0)], NOW)
    never = effect_of(Span("kill", "expert", 20.0, 22.0, None), math.inf, [Outcome(20.0, [20.5, 23.5], end=24.0)], NOW)
    (row,) = rows([quiet, never])
    assert (row.faults, row.requests, row.stall_median, row.stall_max) == (2, 2, 2.0, 3.0)
    assert (row.back_max, row.not_back) == (0.5, 1)


def test_errors_are_told_with_their_fault() -> None:
    lost = Outcome(9.0, [9.5], end=11.0, error="InternalError: bug")
    assert errors([effect_of(SPAN, math.inf, [lost, lost], NOW)]) == {"kill expert: InternalError: bug": 2}


def test_jobs_are_the_same_for_a_seed() -> None:
    jobs = make_jobs(8, 100, seed=5)
    assert jobs == make_jobs(8, 100, seed=5)
    assert jobs != make_jobs(8, 100, seed=6)
    assert all(isinstance(job, Job) and max(job.prompt) < 100 for job in jobs)
    assert {job.options["temperature"] for job in jobs} == {0.0, 0.9}
