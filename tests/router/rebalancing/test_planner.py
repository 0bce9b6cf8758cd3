"""Plans: what they promise holds after every step, for any load, any workers, any placement to begin with."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.rebalancing import Plan, RebalanceSettings, Situation, make_plan
from router.rebalancing.layer import Layout, copies_of, peak
from router.rebalancing.matching import assign, match
from router.rebalancing.packing import pack, replicate
from router.rebalancing.search import improve
from router.rebalancing.situation import imbalance

EAGER = RebalanceSettings(load_slowdown=0.0, min_improvement=0.0)
"""Loading costs nothing: every improvement is worth it."""


def layout_of(*held: set[int]) -> Layout:
    return tuple(map(frozenset, held))


def situation_of(load_LE: list[list[float]], *layouts: Layout, **changes: object) -> Situation:
    num_workers = len(layouts[0])
    plain = Situation(
        load_LE,
        layouts,
        (0,) * num_workers,
        (1.0,) * num_workers,
        seconds_per_row=1e-4,
        pair_bytes=10**6,
        load_rate=1e9,
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    num_layers, num_experts = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    num_workers = draw(st.integers(1, 4))
    loads = st.lists(st.floats(0, 1000), min_size=num_experts, max_size=num_experts)
    layouts = []
    for _ in range(num_layers):
        held: list[set[int]] = [set() for _ in range(num_workers)]
        for expert in range(num_experts):
            for worker in draw(st.sets(st.integers(0, num_workers - 1), min_size=1, max_size=num_workers)):
                held[worker].add(expert)
        layouts.append(layout_of(*held))
    totals = [sum(len(layout[worker]) for layout in layouts) for worker in range(num_workers)]
    spare = draw(st.lists(st.none() | st.integers(0, 3), min_size=num_workers, max_size=num_workers))
    rooms = zip(totals, spare, strict=True)
    return situation_of(
        [draw(loads) for _ in range(num_layers)],
        *layouts,
        # Nought means that any number fits, so a full worker that holds nothing has room for one.
        capacity_W=tuple(0 if more is None else max(1, total + more) for total, more in rooms),
        cost_W=tuple(draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=num_workers, max_size=num_workers))),
    )


def replay(situation: Situation, plan: Plan, min_copies: int) -> list[Layout]:
    """Does the steps one half after the other, and checks everything in between. Returns the last placement."""
    held = [
        {(layer, expert) for layer, layout in enumerate(situation.layouts) for expert in layout[worker]}
        for worker in range(len(situation.capacity_W))
    ]
    everything = {pair for worker in held for pair in worker}
    floor = {pair: min(min_copies, sum(pair in worker for worker in held)) for pair in everything}

    def check() -> None:
        for pair in everything:
            assert sum(pair in worker for worker in held) >= floor[pair] >= 1
        for worker, capacity in zip(held, situation.capacity_W, strict=True):
            assert not capacity or len(worker) <= capacity

    for step in plan.steps:
        assert step.pairs
        if step.target is not None:
            assert not step.pairs & held[step.target], "nothing is loaded that is there"
            held[step.target] |= step.pairs
            check()
        if step.source is not None:
            assert step.pairs <= held[step.source]
            held[step.source] -= step.pairs
            check()
    return [
        layout_of(*({expert for at, expert in worker if at == layer} for worker in held))
        for layer in range(len(situation.layouts))
    ]


class TestPlan:
    @given(situations(), st.integers(0, 2))
    @settings(max_examples=300, deadline=None)
    def test_nothing_is_missing_or_too_much_at_any_time_and_nothing_gets_worse(
        self, situation: Situation, min_replicas: int
    ) -> None:
        limits = dataclasses.replace(EAGER, min_replicas=min_replicas)
        plan = make_plan(situation, limits)
        fewest = min(min(copies_of(layout, len(situation.load_LE[0]))) for layout in situation.layouts)
        after = replay(situation, plan, min_replicas or fewest)
        before = situation.peak_seconds(situation.layouts)
        assert situation.peak_seconds(after) <= before * (1 + 1e-9)
        assert bool(plan.steps) == (situation.peak_seconds(after) < before)
        assert plan.imbalance == pytest.approx(situation.imbalance(situation.layouts))
        assert plan.forecast == pytest.approx(situation.imbalance(after))
        saved = (before - situation.peak_seconds(after)) * limits.horizon
        assert plan.gain == pytest.approx(saved, rel=1e-6, abs=1e-9)

    @given(situations())
    @settings(max_examples=100, deadline=None)
    def test_a_second_plan_finds_little_more(self, situation: Situation) -> None:
        """What is best once stays so: no moves to and fro under the same load."""
        first = make_plan(situation, EAGER)
        moved = dataclasses.replace(situation, layouts=tuple(replay(situation, first, 1)))
        again = make_plan(dataclasses.replace(moved, capacity_W=situation.capacity_W), EAGER)
        third = dataclasses.replace(moved, layouts=tuple(replay(moved, again, 1)))
        assert third.peak_seconds(third.layouts) <= moved.peak_seconds(moved.layouts) * (1 + 1e-9)

    def test_a_hot_expert_moves_away_from_its_neighbour(self) -> None:
        situation = situation_of([[100.0, 100.0, 1.0, 1.0]], layout_of({0, 1}, {2, 3}))
        plan = make_plan(situation, EAGER)
        assert plan.imbalance == pytest.approx(200 / 101)
        assert plan.forecast == pytest.approx(1.0)
        assert plan.is_worth_it
        after = replay(situation, plan, 1)
        assert len(after[0][0] & {0, 1}) == len(after[0][1] & {0, 1}) == 1

    def test_a_spare_worker_gets_a_replica_of_the_hottest(self) -> None:
        situation = situation_of([[100.0, 10.0, 10.0, 10.0]], layout_of({0, 1}, {2, 3}, set()))
        (after,) = replay(situation, make_plan(situation, EAGER), 1)
        assert copies_of(after, 4)[0] >= 2
        assert peak(after, situation.load_LE[0], situation.cost_W) < 60

    def test_a_slow_worker_gets_less(self) -> None:
        situation = situation_of([[10.0] * 4], layout_of({0, 1}, {2, 3}), cost_W=(1.0, 3.0), capacity_W=(3, 3))
        (after,) = replay(situation, make_plan(situation, EAGER), 1)
        assert [len(held) for held in after] == [3, 1]

    def test_full_workers_exchange_by_way_of_a_third(self) -> None:
        situation = situation_of(
            [[100.0, 100.0, 1.0, 1.0]], layout_of({0, 1}, {2, 3}, set()), capacity_W=(2, 2, 1), cost_W=(1.0, 1.0, 999.0)
        )
        plan = make_plan(situation, EAGER)
        (after,) = replay(situation, plan, 1)
        assert len(after[0] & {0, 1}) == len(after[1] & {0, 1}) == 1
        assert after[2] == frozenset()

    def test_full_workers_alone_stay_as_they_are(self) -> None:
        situation = situation_of([[100.0, 100.0, 1.0, 1.0]], layout_of({0, 1}, {2, 3}), capacity_W=(2, 2))
        assert make_plan(situation, EAGER) == Plan((), pytest.approx(200 / 101), pytest.approx(200 / 101), 0.0, 0.0)

    def test_what_loading_costs_is_weighed(self) -> None:
        situation = situation_of([[100.0, 100.0, 1.0, 1.0]], layout_of({0, 1}, {2, 3}), load_rate=1e6)
        # One load takes a second, 0.5 of which is lost; 100 of 200 rows per second are saved for as long as it lasts.
        costly = RebalanceSettings(horizon=0.4, load_slowdown=0.5)
        plan = make_plan(situation, costly)
        assert plan.steps
        assert plan.cost == pytest.approx(
            0.5 * 0.02 * sum(len(step.pairs) for step in plan.steps if step.target is not None)
        )
        assert plan.gain < plan.cost
        assert not plan.is_worth_it
        assert make_plan(situation, dataclasses.replace(costly, horizon=1000.0)).is_worth_it

    def test_only_layers_that_pay_are_touched(self) -> None:
        even, skewed = [1.0] * 4, [100.0, 100.0, 1.0, 1.0]
        present = layout_of({0, 1}, {2, 3})
        plan = make_plan(situation_of([even, skewed, even], present, present, present), EAGER)
        assert {layer for step in plan.steps for layer, _ in step.pairs} == {1}

    def test_no_load_no_plan(self) -> None:
        plan = make_plan(situation_of([[0.0] * 4], layout_of({0, 1}, {2, 3})), RebalanceSettings())
        assert plan == Plan((), 0.0, 0.0, 0.0, 0.0)

    def test_steps_between_the_same_workers_are_one(self) -> None:
        present = layout_of({0, 1}, {2, 3})
        layers = 8
        situation = situation_of([[100.0, 100.0, 1.0, 1.0]] * layers, *[present] * layers)
        plan = make_plan(situation, EAGER)
        assert len(plan.steps) <= 2
        small = dataclasses.replace(EAGER, max_step_bytes=3 * situation.pair_bytes)
        assert max(len(step.pairs) for step in make_plan(situation, small).steps) == 3

    @given(st.lists(st.floats(0, 100), min_size=2, max_size=5), st.integers(2, 3), st.data())
    @settings(max_examples=150, deadline=None)
    def test_near_the_optimum(self, load: list[float], num_workers: int, data: st.DataObject) -> None:
        """One layer, one copy each, places for a few more than needed: within a third of the best there is."""
        held: list[set[int]] = [set() for _ in range(num_workers)]
        for expert in range(len(load)):
            held[data.draw(st.integers(0, num_workers - 1))].add(expert)
        room = data.draw(st.integers(0, 2))
        capacity = tuple(max(1, len(experts)) + room for experts in held)
        situation = situation_of([load], layout_of(*held), capacity_W=capacity)
        (places_W,) = situation.places()
        best = min(_all_peaks(load, places_W), default=math.inf)
        packed = pack(load, [1] * len(load), places_W, situation.cost_W)
        assert packed is not None
        assert peak(improve(packed, load, places_W, situation.cost_W), load, situation.cost_W) <= best * 4 / 3 + 1e-9


def _all_peaks(load: list[float], places_W: list[int]) -> list[float]:
    peaks = []
    for workers in itertools.product(range(len(places_W)), repeat=len(load)):
        if all(workers.count(each) <= room for each, room in enumerate(places_W)):
            peaks.append(
                max(sum(rows for rows, at in zip(load, workers, strict=True) if at == each) for each in workers)
            )
    return peaks


class TestParts:
    def test_the_hottest_per_copy_gets_the_next_one(self) -> None:
        assert replicate([9.0, 4.0, 1.0], 6, 1, 4) == [3, 2, 1]
        assert replicate([9.0, 4.0, 1.0], 9, 1, 2) == [2, 2, 2]

    @given(
        st.integers(1, 6).flatmap(
            lambda size: st.lists(
                st.lists(st.integers(0, 9).map(float), min_size=size, max_size=size), min_size=size, max_size=size
            )
        )
    )
    def test_the_assignment_is_the_cheapest(self, costs: list[list[float]]) -> None:
        chosen = assign(costs)
        assert sorted(chosen) == list(range(len(costs)))
        best = min(
            sum(row[column] for row, column in zip(costs, columns, strict=True))
            for columns in itertools.permutations(range(len(costs)))
        )
        assert sum(row[column] for row, column in zip(costs, chosen, strict=True)) == best

    def test_sets_go_to_those_who_have_most_of_them(self) -> None:
        present, packed = layout_of({0, 1}, {2, 3}, {4, 5}), layout_of({4, 5}, {0, 2}, {1, 3})
        matched = match(present, packed, [1.0] * 6, [2, 2, 2], [1.0] * 3)
        assert matched[2] == {4, 5}
        assert {matched[0], matched[1]} == {frozenset({0, 2}), frozenset({1, 3})}

    def test_a_set_too_heavy_for_a_slow_worker_stays_away(self) -> None:
        present, packed = layout_of({0}, {1}), layout_of({1}, {0})
        assert match(present, packed, [9.0, 1.0], [1, 1], [3.0, 1.0]) == packed

    def test_imbalance_is_by_layer(self) -> None:
        assert imbalance([[1.0, 1.0], [1.0, 1.0]]) == 1.0
        assert imbalance([[2.0, 0.0], [0.0, 2.0]]) == 2.0, "each layer waits, whatever the sums are"
        assert imbalance([[0.0, 0.0]]) == 0.0
