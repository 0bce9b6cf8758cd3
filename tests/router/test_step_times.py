"""What a worker takes, by class of work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.request import Request
from router.sequence import Sequence
from router.step import Chunk, Step
from router.step_times import POSITION_WORK, WINDOW, StepTimes, work_of


def seen(*times: tuple[int, float]) -> StepTimes:
    made = StepTimes()
    for work, seconds in times:
        made.add(work, seconds)
    return made


def test_little_is_nothing() -> None:
    assert seen().long(1000) is None
    assert seen(*[(1000, 0.1)] * 3).usual(1000) is None
    assert seen(*[(1000, 0.1)] * 4).usual(1000) == 0.1
    assert not seen(*[(1000, 0.1)] * 3).is_known(1000)


@pytest.mark.parametrize("count", [4, 8, 16, 64, 256])
def test_one_answer_that_took_seconds_changes_neither_number(count: int) -> None:
    times = seen((1000, 9.0), *[(1000, 0.1)] * (count - 1))
    assert (times.usual(1000), times.long(1000)) == (0.1, 0.1)


def test_the_long_one_is_above_most_and_the_usual_one_in_the_middle() -> None:
    times = seen(*[(1000, 0.1)] * 100, *[(1000, 0.2)] * 60)
    assert (times.usual(1000), times.long(1000)) == (0.1, 0.2)


def test_what_is_not_known_is_bounded_by_the_next_smaller_and_larger() -> None:
    times = seen(*[(1024, 0.1)] * 4, *[(16384, 0.3)] * 4)
    assert times.usual(100) == pytest.approx(0.1), "less work takes less"
    assert times.usual(2048) == pytest.approx(0.2), "twice the work takes at most twice as long"
    assert times.usual(8192) == pytest.approx(0.3), "and not more than what is more work"
    assert times.usual(65536) == pytest.approx(1.2)


def test_a_bad_moment_is_not_believed_if_more_work_takes_less() -> None:
    times = seen(*[(1024, 0.5)] * 4, *[(16384, 0.02)] * 4)
    assert (times.usual(1024), times.long(1024)) == (0.02, 0.02)
    assert seen(*[(1024, 0.01)] * 4, *[(16384, 0.5)] * 4).long(1024) == 0.01


def test_old_times_are_forgotten() -> None:
    assert seen(*[(1000, 5.0)] * WINDOW, *[(1000, 0.1)] * WINDOW).long(1000) == 0.1


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.001, 100)), min_size=1, max_size=300))
def test_the_usual_one_is_never_above_the_long_one_nor_outside_of_what_was_seen(times: list[tuple[int, float]]) -> None:
    made = seen(*times)
    for work, _ in times:
        usual, long = made.usual(work), made.long(work)
        if made.is_known(work):
            assert usual is not None
            assert long is not None
            own = [seconds for other, seconds in times if other.bit_length() >= work.bit_length()]
            assert min(own) <= usual <= long <= max(own)


def test_work_counts_tokens_and_what_they_look_at() -> None:
    def chunk(start: int, num_tokens: int) -> Chunk:
        sequence = Sequence(Request(request_id="x", prompt_ids=(1,)), 0)
        return Chunk(sequence, start, (1,) * num_tokens, (), wants_token=False)

    assert work_of(Step((chunk(99, 1),))) == POSITION_WORK + 100
    assert work_of(Step((chunk(0, 10), chunk(99, 1)))) == 10 * (POSITION_WORK + 10) + POSITION_WORK + 100
