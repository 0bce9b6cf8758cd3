"""Places in the queue: fair between callers, ahead for priority, never for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.fair_share import MAX_IDLE_CALLERS, FairShare


def served(arrivals: list[tuple[str, float, int]]) -> list[int]:
    """All arrive at once; the order in which they are admitted, by number of arrival."""
    share = FairShare(priority_cost=100.0)
    queue = [(share.place(*arrival)[0], arrival[2], index) for index, arrival in enumerate(arrivals)]
    order = []
    for place, priority, index in sorted(queue):
        share.admitted(place, priority)
        order.append(index)
    return order


def test_one_caller_is_served_in_order() -> None:
    assert served([("a", 10, 0)] * 5) == [0, 1, 2, 3, 4]


def test_a_single_request_goes_between_the_thousand_of_another() -> None:
    order = served([*[("greedy", 10, 0)] * 1000, ("modest", 10, 0)])
    assert order.index(1000) == 1


def test_shares_are_of_work_and_not_of_requests() -> None:
    order = served([*[("long", 40, 0)] * 10, *[("short", 10, 0)] * 40])
    first = order[:25]
    assert sum(index < 10 for index in first) == 5, "half of the work is the long ones'"


def test_priority_is_a_head_start_and_no_right_of_way() -> None:
    assert served([("a", 10, 0), ("b", 10, 1), ("c", 10, -1)]) == [1, 0, 2]
    share = FairShare(priority_cost=100.0)
    (low,) = share.place("patient", 10, -1)
    later = []
    for _ in range(30):
        (place,) = share.place("busy", 10, 0)
        share.admitted(place)
        later.append(place)
    assert low > later[0]
    assert low < later[-1], "ten of them went first, not all"


def test_who_was_idle_has_saved_nothing_up() -> None:
    share = FairShare()
    for _ in range(100):
        share.admitted(share.place("busy", 10)[0])
    (idle,), (busy,) = share.place("idle", 10), share.place("busy", 10)
    assert abs(idle.start - busy.start) <= 10


def test_candidates_stand_together() -> None:
    share = FairShare()
    first, second = share.place("a", 10, count=2)
    (next_,) = share.place("a", 10)
    assert first.start == second.start
    assert next_.start == first.start + 20


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(1, 1000), st.integers(-2, 2)), max_size=60))
def test_places_are_unique_and_everybody_is_served(arrivals: list[tuple[str, float, int]]) -> None:
    assert sorted(served(arrivals)) == list(range(len(arrivals)))


def test_callers_that_come_once_are_forgotten() -> None:
    share = FairShare()
    for number in range(3 * MAX_IDLE_CALLERS):
        share.admitted(share.place(f"caller-{number}", 10)[0])
        share.admitted(share.place("steady", 10)[0])
    assert len(share._clocks) <= MAX_IDLE_CALLERS + 1
