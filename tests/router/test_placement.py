"""Where experts are put, what the table says, and which worker a call uses."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from grokmoe.errors import ConfigError
from grokmoe.expert_spec import describe_units, parse_experts
from grokmoe.expert_units import expert_of, slice_of, unit_of, units_of
from grokmoe.model_config import TINY
from router.placement import NOBODY, Placement, check_held, is_held, spread


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


@given(st.integers(1, 12), st.integers(1, 24), st.integers(1, 3), st.integers(1, 8))
def test_spread_slices(num_experts: int, num_workers: int, num_replicas: int, num_slices: int) -> None:
    assume(num_replicas <= num_workers <= num_experts * num_replicas * num_slices)
    held = spread(num_experts, num_workers, num_replicas, num_slices)
    all_units = [unit for expert in range(num_experts) for unit in units_of(expert, num_slices)]
    assert Counter(unit for units in held for unit in units) == dict.fromkeys(all_units, num_replicas)
    assert all(units and list(units) == sorted(units) for units in held)
    sizes = [len(units) for units in held]
    assert max(sizes) - min(sizes) <= num_replicas
    if num_workers >= num_slices and num_replicas == 1:
        for units in held:
            experts = list(map(expert_of, units))
            assert len(set(experts)) == len(experts), "slices of one expert are computed at the same time"


def test_spread_slices_examples() -> None:
    assert [describe_units(units) for units in spread(8, 4, 1, 2)] == ["0-3:1/2", "4-7:1/2", "0-3:2/2", "4-7:2/2"]
    assert [describe_units(units) for units in spread(2, 4, 1, 4)] == ["0-1:1/4", "0-1:2/4", "0-1:3/4", "0-1:4/4"]
    assert [describe_units(units) for units in spread(2, 2, 2, 2)] == ["0-1:1-2/2"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 9, 1, 4), "9 workers for 2 experts x 4 slices x 1 replicas"),
        ((8, 0, 1), "at least one worker"),
        ((8, 2, 0), "at least one worker and one replica"),
        ((8, 2, 3), "3 replicas of an expert need as many workers, there are 2"),
        ((8, 9, 1), "9 workers for 8 experts"),
    ],
)
def test_spreads_that_cannot_be(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spread(*arguments)


def test_the_table_is_what_workers_say() -> None:
    placement = Placement.build(2, 3, {1: [(0, 0, 2), (1, 0, 1)], 0: [(1, 0, 2), (2, 0, 2)]})
    assert placement.holders == ({0: (1,), 1: (0, 1), 2: (0,)}, {0: (1,), 1: (0,), 2: (0,)})
    assert placement.slicings == ({}, {})


def test_preferred_workers_come_in_their_order() -> None:
    held = {worker: [(expert, 0, 1) for expert in range(2)] for worker in range(3)}
    placement = Placement.build(1, 2, held, {0: [2, 0]})
    assert placement.holders == ({0: (2, 0), 1: (0, 1, 2)},)


@pytest.mark.parametrize(
    ("held", "preferred", "message"),
    [
        ({0: [(0, 0, 2)]}, None, "no expert worker holds expert 1 in layer 0"),
        ({0: [(0, 0, 2), (1, 0, 1)]}, None, "no expert worker holds expert 1 in layer 1"),
        ({}, None, "no expert worker holds expert 0"),
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


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ((2, 0, 2), "w says it holds expert 2 in layers 0-1; the model has 2 experts and 2 layers"),
        ((0, 0, 3), "says it holds expert 0 in layers 0-2"),
        ((0, 1, 1), "says it holds expert 0"),
        ((unit_of(2, 0, 2), 0, 1), "says it holds expert 2"),
        ((unit_of(1, 0, 3), 0, 1), "w says it holds slices of expert 1: their number is 3, which does not divide"),
        ((unit_of(1, 0, 4), 0, 1), "is 4: slices 16 wide of the ffn dimension 64, must be a multiple of 32"),
    ],
)
def test_what_no_worker_can_hold(held: tuple[int, int, int], message: str) -> None:
    config = dataclasses.replace(TINY, num_experts=2, num_layers=2, intermediate_size=64)
    check_held(config, "w", [(1, 0, 2), (unit_of(1, 1, 2), 0, 1)])
    with pytest.raises(ConfigError, match=message):
        check_held(config, "w", [(1, 0, 2), held])


def test_at_run_time_a_table_may_have_holes() -> None:
    table = Placement.build(2, 2, {3: [(0, 0, 2)]}, {0: [9, 3], 1: [9]}, ready={3, 4})
    assert table.holders == ({0: (3,), 1: ()}, {0: (3,), 1: ()})
    table = Placement.build(1, 2, {3: [(0, 0, 1)], 4: [(0, 0, 1), (1, 0, 1)]}, {0: [9]}, ready={3, 4})
    assert table.holders == ({0: (3, 4), 1: (4,)},), "without any preferred worker all others are used"


def table(*workers: tuple[int, ...]) -> Placement:
    """Of one layer of whole experts."""
    return Placement((dict(enumerate(workers)),), ({},))


def chosen(placement: Placement, *args: Any) -> list[int]:
    return list(placement.choose(0, *args).values())


class TestChoose:
    PLACEMENT = table((0, 1), (0, 1), (0, 1), (2,))
    THREE = table(*[(0, 1, 2)] * 6)

    def test_replicas_share_the_experts_of_an_idle_cluster(self) -> None:
        assert chosen(self.PLACEMENT, {0: 0, 1: 0, 2: 0}, lambda: 0.0) == [0, 1, 0, 2]
        for draw in (0.0, 0.99):
            assert chosen(self.THREE, {0: 7, 1: 7, 2: 7}, lambda draw=draw: draw) == [0, 1, 2, 0, 1, 2]  # type: ignore[misc]

    def test_replicas_take_turns(self) -> None:
        load = {0: 0, 1: 0, 2: 0}
        assert chosen(self.PLACEMENT, load, lambda: 0.0, 1) == [1, 0, 1, 2]
        turns = [chosen(self.THREE, load, lambda: 0.0, turn) for turn in range(3)]
        assert [sorted(column) for column in zip(*turns, strict=True)] == [[0, 1, 2]] * 6
        assert chosen(self.PLACEMENT, {0: 5, 1: 4, 2: 0}, lambda: 0.0, 1) == [1, 1, 1, 2], "load comes first"

    def test_of_two_the_least_loaded_is_used(self) -> None:
        assert chosen(self.PLACEMENT, {0: 5, 1: 4, 2: 0}, lambda: 0.0) == [1, 1, 1, 2]
        assert chosen(self.PLACEMENT, {0: 5, 1: 5, 2: 99}, lambda: 0.0) == [0, 1, 0, 2]

    def test_one_of_the_two_is_drawn(self) -> None:
        load = {0: 9, 1: 0, 2: 5}
        assert chosen(self.THREE, load, lambda: 0.0) == [1, 1, 2, 1, 1, 2], "the next one"
        assert chosen(self.THREE, load, lambda: 0.99) == [2, 1, 1, 2, 1, 1], "the last one"

    @given(
        load=st.dictionaries(st.integers(0, 4), st.integers(0, 99)),
        holders=st.lists(st.lists(st.integers(0, 4), unique=True), min_size=1, max_size=8),
        draw=st.floats(0, 1, exclude_max=True),
    )
    def test_a_holder_that_is_ready_and_never_the_most_loaded(
        self, load: dict[int, int], holders: list[list[int]], draw: float
    ) -> None:
        found = chosen(table(*map(tuple, holders)), load, lambda: draw)
        for workers, worker in zip(holders, found, strict=True):
            ready = [each for each in workers if each in load]
            if not ready:
                assert worker == NOBODY
                continue
            assert worker in ready
            others = [load[each] for each in ready if each != worker]
            assert not others or load[worker] <= max(others)

    def test_only_ready_workers_are_used(self) -> None:
        assert chosen(self.PLACEMENT, {1: 1000}, lambda: 0.0) == [1, 1, 1, NOBODY]
        assert chosen(self.PLACEMENT, {}, lambda: 0.0) == [NOBODY] * 4


def held(*specs: str) -> dict[int, list[tuple[int, int, int]]]:
    """Of two experts in one layer, by worker."""
    return {
        worker: [(unit, 0, 1) for unit in parse_experts(spec, 2, 1)[0]] for worker, spec in enumerate(specs) if spec
    }


def used(placement: Placement) -> str:
    return describe_units(placement.holders[0])


class TestSlices:
    def test_slices_are_units_of_their_own(self) -> None:
        table = Placement.build(1, 2, held("0:1/2+1", "0:2/2", "0:2/2+1"))
        first, second = units_of(0, 2)
        assert table.holders == ({1: (0, 2), first: (0,), second: (1, 2)},)
        assert list(table.holders[0]) == sorted(table.holders[0])
        assert table.slicings == ({},)
        assert table.choose(0, {0: 0, 1: 0, 2: 0}, lambda: 0.0) == {1: 0, first: 0, second: 1}
        assert table.choose(0, {0: 0, 2: 0}, lambda: 0.0) == {1: 0, first: 0, second: 2}
        assert table.choose(0, {1: 0}, lambda: 0.0) == {1: NOBODY, first: NOBODY, second: 1}

    def test_layers_and_experts_may_differ(self) -> None:
        held = {0: [(0, 0, 1), (unit_of(0, 0, 2), 1, 2), (unit_of(1, 1, 4), 0, 2)]}
        held[1] = [(unit_of(0, 1, 2), 1, 2), *[(unit_of(1, index, 4), 0, 2) for index in (0, 2, 3)]]
        table = Placement.build(2, 2, held)
        assert [describe_units(row) for row in table.holders] == ["0+1:1-4/4", "0:1-2/2+1:1-4/4"]

    @pytest.mark.parametrize(
        ("specs", "preferred", "message"),
        [
            (("0:1/2+1", "1"), {}, "no expert worker holds expert 0:2/2 in layer 0"),
            (("0:1,3/3+1", "1"), {}, "no expert worker holds expert 0:2/3 in layer 0"),
            (("0:1/2+1", "0:2/2"), {unit_of(0, 1, 2): [0]}, "puts expert 0:2/2 on worker 0, which does not hold it"),
            (("0+1", ""), {unit_of(0, 1, 2): [0]}, "puts expert 0:2/2 on worker 0, which does not hold it"),
        ],
    )
    def test_tables_that_cannot_be(self, specs: tuple[str, ...], preferred: dict[int, list[int]], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Placement.build(1, 2, held(*specs), preferred)

    @pytest.mark.parametrize(
        ("specs", "ready", "wanted"),
        [
            (("0-1", "0:1/2", "0:2/2"), {0, 1, 2}, "0-1"),
            (("0-1", "0:1/2", "0:2/2"), {1, 2}, "1+0:1-2/2"),
            (("0-1", "0:1/2", "0:2/2"), {0, 2}, "0-1"),
            (("0-1", "0:1/2", "0:2/2"), {2}, "0-1"),
            (("0-1", "0:1/2"), {1}, "0-1"),
            (("0:1/2+1", "0:all/4"), {0, 1}, "1+0:1-4/4"),
            (("0:1/2+1", "0:1-3/4"), {0, 1}, "1+0:1-2/2"),
            (("0:1/2+1", "0:2/2", "0:all/4"), {0, 1, 2}, "1+0:1-2/2"),
            (("0:1/2+1", "0:2/2", "0:all/4"), {0, 2}, "1+0:1-4/4"),
            (("1",), {0}, "0-1"),
        ],
    )
    def test_the_fewest_slices_that_are_all_there_are_used(
        self, specs: tuple[str, ...], ready: set[int], wanted: str
    ) -> None:
        table = Placement.build(1, 2, held(*specs), ready=ready)
        assert used(table) == wanted
        for expert in range(2):
            ours = [unit for unit in table.holders[0] if expert_of(unit) == expert]
            assert ours == list(units_of(expert, slice_of(ours[0]).num_slices)), "all of one cut, and nothing else"

    def test_what_a_table_from_outside_names_comes_first(self) -> None:
        preferred = {unit: [1 + place] for place, unit in enumerate(units_of(0, 2))}
        specs = "0-1", "0:1/2", "0:2/2", "0:2/2"
        assert used(Placement.build(1, 2, held(*specs), preferred)) == "1+0:1-2/2"
        table = Placement.build(1, 2, held(*specs), preferred, ready={0, 1, 3})
        assert used(table) == "0-1", "they are used as long as they are there"
        assert Placement.build(1, 2, held(*specs), preferred).holders[0][unit_of(0, 1, 2)] == (2,)

    def test_who_can_do_without_whom(self) -> None:
        table = Placement.build(1, 2, held("0-1", "0:1/2", "0:2/2+1"), ready={0, 1, 2})
        first, second = units_of(0, 2)
        assert table.can_serve(0, 0, {1, 2}), "as slices"
        assert table.can_serve(0, first, {0}), "whole"
        assert not table.can_serve(0, 0, {1})
        assert not table.can_serve(0, second, {1})
        assert table.can_serve(0, 1, {2})
        assert not table.can_serve(0, 1, {1})

    @given(st.data())
    def test_expert_held(self, data: st.DataObject) -> None:
        """Against the definition: of some number all slices are there."""
        every = [*units_of(0, 1), *units_of(0, 2), *units_of(0, 3), *units_of(1, 2)]
        there = data.draw(st.sets(st.sampled_from(every)))
        pairs = {(3, unit) for unit in there} | {(2, unit) for unit in every}
        for expert in range(2):
            wanted = any(there.issuperset(units_of(expert, number)) for number in (1, 2, 3))
            assert all(is_held(pairs, 3, unit) == wanted for unit in every if expert_of(unit) == expert)
