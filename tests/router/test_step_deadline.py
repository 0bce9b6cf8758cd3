"""How long a worker may take, as a function of what it and others took."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.step_deadline import StepDeadline, StepDeadlineSettings

LIMITS = StepDeadlineSettings(factor=8.0, floor=0.5, first_floor=2.0, ceiling=60.0, peer_factor=2.0, leniency=4.0)


def observed(*times: tuple[int, float]) -> StepDeadline:
    deadline = StepDeadline(LIMITS)
    for work, seconds in times:
        deadline.observe(work, seconds)
    return deadline


def test_before_anything_is_known_of_anybody_it_is_the_ceiling() -> None:
    assert observed().allowance(1000) == 60.0
    assert observed().allowance(1000, [observed().times]) == 60.0


def test_it_is_a_multiple_of_what_nine_of_ten_take() -> None:
    assert observed(*[(1000, 0.1)] * 56, *[(1000, 0.2)] * 8).allowance(1000) == pytest.approx(1.6)


@pytest.mark.parametrize("count", [8, 16, 55, 256])
def test_a_hang_that_was_waited_for_is_not_the_measure_of_the_next(count: int) -> None:
    assert observed(*[(1000, 0.1)] * count, (1000, 1.3)).allowance(1000) == pytest.approx(0.8)


def test_never_below_the_floor_nor_above_the_ceiling() -> None:
    assert observed(*[(1000, 0.001)] * 4).allowance(1000) == 0.5
    assert observed(*[(1000, 30.0)] * 4).allowance(1000) == 60.0


def test_a_worker_that_was_just_started_is_measured_by_the_others() -> None:
    known = observed(*[(1000, 0.2)] * 4).times
    assert observed().allowance(1000, [known]) == pytest.approx(8 * 2 * 0.2)
    assert observed().allowance(1000, [observed(*[(1000, 0.001)] * 4).times]) == 2.0, "a first step is slow"


def test_what_others_take_bounds_what_is_guessed_of_larger_work() -> None:
    own, other = observed(*[(1024, 0.1)] * 4), observed(*[(1 << 17, 0.2)] * 4)
    assert own.allowance(1 << 17) == 60.0
    assert own.allowance(1 << 17, [other.times]) == pytest.approx(8 * 2 * 0.2)
    assert own.allowance(1024, [other.times]) == pytest.approx(0.8), "what is known is not guessed"


def test_where_nobody_is_better_there_is_more_time() -> None:
    assert observed(*[(1000, 0.01)] * 4).allowance(1000, is_lenient=True) == 2.0
    assert observed(*[(1000, 5.0)] * 4).allowance(1000, is_lenient=True) == 60.0


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 100)), max_size=200),
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 100)), max_size=50),
    st.integers(1, 10**6),
    st.booleans(),
)
def test_it_is_always_between_floor_and_ceiling(
    times: list[tuple[int, float]], peers: list[tuple[int, float]], work: int, is_lenient: bool
) -> None:
    allowed = observed(*times).allowance(work, [observed(*peers).times], is_lenient)
    assert LIMITS.floor <= allowed <= LIMITS.ceiling
