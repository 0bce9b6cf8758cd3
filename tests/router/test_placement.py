"""Where experts are put, what the table says, and which worker a call uses."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from grokmoe.errors import ConfigError
from router.placement import NOBODY, Placement, pairs_of, ranges_of, spread


@given(st.integers(1, 20), st.integers(1, 24), st.integers(1, 5))
def test_spread_is_even_and_complete(num_experts: int, num_workers: int, num_replicas: int) -> None:
    assume(num_replicas <= num_workers <= num_experts * num_replicas)
    held = spread(num_experts, num_workers, num_replicas)
    assert len(held) == num_workers
    assert all(list(experts) == sorted(set(experts)) and experts for experts in held)
    assert Counter(expert for experts in held for expert in experts) == dict.fromkeys(range(num_experts), num_replicas)
    sizes = [len(experts) for experts in held]
    assert max(sizes) - min(sizes) <= num_replicas
    if num_experts % num_workers == 0:
        assert len(set(sizes)) == 1, "exactly even where it can be"


def test_spread_examples() -> None:
    assert spread(8, 2) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert spread(8, 3) == ((0, 1, 2), (3, 4, 5), (6, 7))
    assert spread(4, 4, 2) == ((0, 3), (0, 1), (1, 2), (2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 0, 1), "at least one worker"),
        ((8, 2, 0), "at least one worker and one replica"),
        ((8, 2, 3), "3 replicas of an expert need as many workers, there are 2"),
        ((8, 9, 1), "9 workers for 8 experts"),
    ],
)
def test_spreads_that_cannot_be(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spread(*arguments)


def test_the_table_is_what_workers_say() -> None:
    placement = Placement.build(2, 3, {1: [(0, 0, 2), (1, 0, 1)], 0: [(1, 0, 2), (2, 0, 2)]})
    assert placement.holders == (((1,), (0, 1), (0,)), ((1,), (0,), (0,)))


def test_preferred_workers_come_in_their_order() -> None:
    held = {worker: [(expert, 0, 1) for expert in range(2)] for worker in range(3)}
    placement = Placement.build(1, 2, held, {0: [2, 0]})
    assert placement.holders == (((2, 0), (0, 1, 2)),)


@pytest.mark.parametrize(
    ("held", "preferred", "message"),
    [
        ({0: [(0, 0, 2)]}, None, "no expert worker holds expert 1 in layer 0"),
        ({0: [(0, 0, 2), (1, 0, 1)]}, None, "no expert worker holds expert 1 in layer 1"),
        ({}, None, "no expert worker holds expert 0"),
        ({0: [(2, 0, 2)]}, None, "says it holds expert 2 in layers 0-1; the model has 2 experts"),
        ({0: [(0, 0, 3)]}, None, "says it holds expert 0 in layers 0-2"),
        ({0: [(0, 1, 1)]}, None, "says it holds expert 0"),
        ({0: [(0, 0, 2), (1, 0, 2)]}, {1: [4]}, "puts expert 1 on worker 4, which does not hold it"),
        ({0: [(0, 0, 2), (1, 0, 2)]}, {1: []}, "no expert worker holds expert 1"),
        ({0: [(0, 0, 2), (1, 0, 2)]}, {2: [0]}, "names expert 2, the model has experts 0 to 1"),
    ],
)
def test_tables_that_cannot_be(
    held: dict[int, list[tuple[int, int, int]]], preferred: dict[int, list[int]] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Placement.build(2, 2, held, preferred)


def test_at_run_time_a_table_may_have_holes() -> None:
    table = Placement.build(2, 2, {3: [(0, 0, 2)]}, {0: [9, 3], 1: [9]}, is_strict=False)
    assert table.holders == (((3,), ()), ((3,), ()))
    table = Placement.build(1, 2, {3: [(0, 0, 1)], 4: [(0, 0, 1), (1, 0, 1)]}, {0: [9]}, is_strict=False)
    assert table.holders == (((3, 4), (4,)),), "without any preferred worker all others are used"
    with pytest.raises(ConfigError, match="holds expert 2"):
        Placement.build(1, 2, {3: [(2, 0, 1)]}, is_strict=False)


class TestChoose:
    PLACEMENT = Placement((((0, 1), (0, 1), (0, 1), (2,)),))
    THREE = Placement((((0, 1, 2),) * 6,))

    def test_replicas_share_the_experts_of_an_idle_cluster(self) -> None:
        assert self.PLACEMENT.choose(0, {0: 0, 1: 0, 2: 0}, lambda: 0.0) == [0, 1, 0, 2]
        for draw in (0.0, 0.99):
            assert self.THREE.choose(0, {0: 7, 1: 7, 2: 7}, lambda draw=draw: draw) == [0, 1, 2, 0, 1, 2]  # type: ignore[misc]

    def test_replicas_take_turns(self) -> None:
        load = {0: 0, 1: 0, 2: 0}
        assert self.PLACEMENT.choose(0, load, lambda: 0.0, turn=1) == [1, 0, 1, 2]
        turns = [self.THREE.choose(0, load, lambda: 0.0, turn) for turn in range(3)]
        assert [sorted(column) for column in zip(*turns, strict=True)] == [[0, 1, 2]] * 6
        assert self.PLACEMENT.choose(0, {0: 5, 1: 4, 2: 0}, lambda: 0.0, turn=1) == [1, 1, 1, 2], "load comes first"

    def test_of_two_the_least_loaded_is_used(self) -> None:
        assert self.PLACEMENT.choose(0, {0: 5, 1: 4, 2: 0}, lambda: 0.0) == [1, 1, 1, 2]
        assert self.PLACEMENT.choose(0, {0: 5, 1: 5, 2: 99}, lambda: 0.0) == [0, 1, 0, 2]

    def test_one_of_the_two_is_drawn(self) -> None:
        load = {0: 9, 1: 0, 2: 5}
        assert self.THREE.choose(0, load, lambda: 0.0) == [1, 1, 2, 1, 1, 2], "the next one"
        assert self.THREE.choose(0, load, lambda: 0.99) == [2, 1, 1, 2, 1, 1], "the last one"

    @given(
        load=st.dictionaries(st.integers(0, 4), st.integers(0, 99)),
        holders=st.lists(st.lists(st.integers(0, 4), unique=True), min_size=1, max_size=8),
        draw=st.floats(0, 1, exclude_max=True),
    )
    def test_a_holder_that_is_ready_and_never_the_most_loaded(
        self, load: dict[int, int], holders: list[list[int]], draw: float
    ) -> None:
        chosen = Placement((tuple(map(tuple, holders)),)).choose(0, load, lambda: draw)
        for workers, worker in zip(holders, chosen, strict=True):
            ready = [each for each in workers if each in load]
            if not ready:
                assert worker == NOBODY
                continue
            assert worker in ready
            others = [load[each] for each in ready if each != worker]
            assert not others or load[worker] <= max(others)

    def test_only_ready_workers_are_used(self) -> None:
        assert self.PLACEMENT.choose(0, {1: 1000}, lambda: 0.0) == [1, 1, 1, NOBODY]
        assert self.PLACEMENT.choose(0, {}, lambda: 0.0) == [NOBODY] * 4


class TestRanges:
    @given(st.sets(st.tuples(st.integers(0, 6), st.integers(0, 4))))
    def test_ranges_name_exactly_the_pairs(self, pairs: set[tuple[int, int]]) -> None:
        ranges = ranges_of(pairs)
        assert pairs_of(ranges) == pairs
        assert list(ranges) == sorted(ranges)
        for (expert, _, end), (other, begin, _) in itertools.pairwise(ranges):
            assert expert != other or end < begin, "as few as can be"

    def test_the_order_is_by_expert_and_layer(self) -> None:
        assert ranges_of({(0, 1), (1, 1), (0, 0), (3, 1)}) == ((0, 0, 1), (1, 0, 2), (1, 3, 4))
        assert ranges_of([]) == ()
