"""How long a worker may take, as a function of what it took."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.sequence import Request, Sequence
from router.step import Chunk, Step
from router.step_deadline import POSITION_WORK, StepDeadline, StepDeadlineSettings, work_of

LIMITS = StepDeadlineSettings(factor=8.0, floor=0.5, ceiling=60.0, window=64, min_samples=4)


def observed(*times: tuple[int, float], limits: StepDeadlineSettings = LIMITS) -> StepDeadline:
    deadline = StepDeadline(limits)
    for work, seconds in times:
        deadline.observe(work, seconds)
    return deadline


def test_before_anything_is_known_it_is_the_ceiling() -> None:
    assert observed().allowance(1000) == 60.0
    assert observed(*[(1000, 0.1)] * 3).allowance(1000) == 60.0


def test_it_is_a_multiple_of_nearly_the_longest_time() -> None:
    assert observed(*[(1000, 0.1)] * 60, *[(1000, 0.2)] * 4).allowance(1000) == pytest.approx(1.6)


def test_never_below_the_floor_nor_above_the_ceiling() -> None:
    assert observed(*[(1000, 0.001)] * 4).allowance(1000) == 0.5
    assert observed(*[(1000, 30.0)] * 4).allowance(1000) == 60.0


def test_larger_work_is_allowed_more_in_proportion() -> None:
    assert observed(*[(1024, 0.1)] * 4).allowance(4096) == pytest.approx(8 * 0.4)


def test_smaller_work_is_allowed_as_much_as_the_next_larger_known() -> None:
    assert observed(*[(1024, 0.1)] * 4, *[(4096, 0.3)] * 4).allowance(100) == pytest.approx(0.8)


def test_old_times_are_forgotten() -> None:
    assert observed(*[(1000, 5.0)] * 64, *[(1000, 0.1)] * 64).allowance(1000) == pytest.approx(0.8)


def test_a_false_alarm_doubles_it_up_to_a_limit() -> None:
    deadline = observed(*[(1000, 0.1)] * 4)
    allowed = []
    for _ in range(6):
        allowed.append(deadline.allowance(1000))
        deadline.forgive()
    assert allowed == pytest.approx([0.8, 1.6, 3.2, 6.4, 12.8, 12.8])


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 100)), max_size=200), st.integers(1, 10**6))
def test_it_is_always_between_floor_and_ceiling_and_grows_with_the_work(
    times: list[tuple[int, float]], work: int
) -> None:
    deadline = observed(*times)
    assert LIMITS.floor <= deadline.allowance(work) <= LIMITS.ceiling


def test_work_counts_tokens_and_what_they_look_at() -> None:
    def chunk(start: int, num_tokens: int) -> Chunk:
        sequence = Sequence(Request(request_id="x", prompt_ids=(1,)), 0)
        return Chunk(sequence, start, (1,) * num_tokens, (), wants_token=False)

    assert work_of(Step((chunk(99, 1),))) == POSITION_WORK + 100
    assert work_of(Step((chunk(0, 10), chunk(99, 1)))) == 10 * (POSITION_WORK + 10) + POSITION_WORK + 100
