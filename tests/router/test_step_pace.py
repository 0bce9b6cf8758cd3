"""When a worker counts as slow beside the others. The clock is turned by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.step_pace import Pace, StepPace, StepPaceSettings

LIMITS = StepPaceSettings(
    factor=4.0, margin=0.0, max_lost=0.3, first_pause=2.0, max_pause=8.0, trial_answers=20, stable_after=10.0
)
OTHERS = 0.01


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def answer(pace: StepPace, clock: Clock, seconds: float, count: int = 1, others: float | None = OTHERS) -> int | None:
    """Number of the answer at which it became slow; None: it did not."""
    for number in range(1, count + 1):
        clock.now += seconds
        if pace.observe(seconds, others):
            return number
    return None


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> StepPace:
    return StepPace(LIMITS, clock)


def test_half_a_second_late_with_every_answer_is_found_at_the_second(pace: StepPace, clock: Clock) -> None:
    assert answer(pace, clock, 0.5, 10) == 2
    assert pace.pace is Pace.SLOW


def test_ten_times_slower_is_found_when_as_much_is_lost(pace: StepPace, clock: Clock) -> None:
    begin = clock.now
    assert answer(pace, clock, 0.1, 100) is not None
    assert clock.now - begin == pytest.approx(0.5)


def test_thrice_as_slow_is_as_fast_as_the_others(pace: StepPace, clock: Clock) -> None:
    assert answer(pace, clock, 0.03, 10_000) is None


def test_one_pause_is_no_pace(pace: StepPace, clock: Clock) -> None:
    for _ in range(50):
        assert answer(pace, clock, 5.0) is None
        assert answer(pace, clock, 0.01, 10) is None
    assert pace.pace is Pace.EVEN


def test_with_nobody_to_compare_with_nothing_is_slow(pace: StepPace, clock: Clock) -> None:
    assert answer(pace, clock, 9.0, 100, others=None) is None


def test_it_is_tried_again_and_forgiven(pace: StepPace, clock: Clock) -> None:
    pace.alarm()
    clock.now += 1.99
    assert pace.pace is Pace.SLOW
    clock.now += 0.02
    assert pace.pace is Pace.TRIAL
    answer(pace, clock, 0.01, 19)
    assert pace.pace is Pace.TRIAL
    answer(pace, clock, 0.01)
    assert pace.pace is Pace.EVEN


def test_every_trial_that_fails_doubles_the_pause(pace: StepPace, clock: Clock) -> None:
    pauses = []
    for _ in range(5):
        pace.alarm()
        begin = clock.now
        while pace.pace is Pace.SLOW:
            clock.now += 0.01
        pauses.append(clock.now - begin)
    assert pauses == pytest.approx([2.0, 4.0, 8.0, 8.0, 8.0], abs=0.02)


@pytest.mark.parametrize(("calm", "pause"), [(1.0, 4.0), (11.0, 2.0)])
def test_a_relapse_soon_after_a_trial_goes_on_with_its_pause(
    pace: StepPace, clock: Clock, calm: float, pause: float
) -> None:
    pace.alarm()
    clock.now += 2.0
    answer(pace, clock, 0.01, 20)
    clock.now += calm
    pace.alarm()
    clock.now += pause - 0.01
    assert pace.pace is Pace.SLOW
    clock.now += 0.02
    assert pace.pace is Pace.TRIAL


@given(st.floats(4.5, 100.0), st.integers(0, 1000), st.floats(0.001, 1.0))
def test_whoever_stays_slow_is_found_and_has_cost_a_bounded_time(ratio: float, num_good: int, others: float) -> None:
    clock = Clock()
    pace = StepPace(LIMITS, clock)
    answer(pace, clock, others, num_good, others)
    seconds = ratio * others
    number = answer(pace, clock, seconds, 10_000, others)
    assert number is not None
    counted = min(seconds - 4.0 * others, 0.15)
    assert number <= 0.3 / counted + 2, "what was good before is no credit"


@given(st.lists(st.floats(0.0, 3.99), min_size=1, max_size=200), st.floats(0.001, 1.0))
def test_below_the_factor_nothing_is_ever_slow(ratios: list[float], others: float) -> None:
    pace = StepPace(LIMITS, Clock())
    assert not any(pace.observe(ratio * others, others) for ratio in ratios)


@given(st.floats(5.0, 50.0), st.integers(2, 2000))
def test_it_does_not_flap(ratio: float, seconds: int) -> None:
    """A worker that stays slow, and is used whenever it may be, is found slow again and again, but ever more rarely."""
    clock = Clock()
    pace = StepPace(LIMITS, clock)
    begin, num_found = clock.now, 0
    while clock.now - begin < seconds:
        if pace.pace is Pace.SLOW:
            clock.now += 0.5
        else:
            num_found += answer(pace, clock, ratio * OTHERS) is not None
    assert num_found <= 3 + seconds / LIMITS.max_pause
