"""Rates that fade, costs of workers, and when an automatic rebalance moves: all with a clock that tests turn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.rebalancing import Pacing, Rate, RebalanceSettings, Situation, make_plan, relative_costs
from router.rebalancing.rates import SAME_KIND


class TestRate:
    @given(st.lists(st.floats(0.01, 500), min_size=1, max_size=20), st.floats(0, 1000))
    def test_a_steady_rate_is_found_at_once(self, pauses: list[float], per_second: float) -> None:
        rate, now = Rate(60.0), 0.0
        rate.observe(now, np.zeros(1))
        for pause in pauses:
            now += pause
            rate.observe(now, np.array([per_second * now]))
            found = rate.per_second()
            assert found is not None
            assert found[0] == pytest.approx(per_second, rel=1e-6, abs=1e-6)

    def test_the_past_fades(self) -> None:
        rate = Rate(60.0)
        rate.observe(0.0, np.array([0.0, 0.0]))
        for now in range(1, 601):
            rate.observe(float(now), np.array([100.0 * now, 0.0]))
        for now in range(601, 661):
            rate.observe(float(now), np.array([60000.0, 100.0 * (now - 600)]))
        found = rate.per_second()
        assert found is not None
        assert found == pytest.approx([100 / math.e, 100 * (1 - 1 / math.e)], rel=0.01)

    def test_nothing_is_said_before_the_second_look(self) -> None:
        rate = Rate(60.0)
        assert rate.per_second() is None
        rate.observe(5.0, np.array([7.0]))
        assert rate.per_second() is None
        assert rate.num_seen == 0
        rate.observe(7.0, np.array([9.0]))
        assert rate.per_second() == pytest.approx([1.0])
        rate.observe(8.0, np.array([1.0]))
        assert rate.per_second() == pytest.approx([1.0]), "a counter that fell is another one"
        rate.restart()
        assert rate.per_second() is None


class TestCosts:
    def test_workers_are_compared_class_by_class(self) -> None:
        """Both take the same for a call of eight rows and of sixty-four; one gets small calls only."""
        small, large = {4: (80.0, 0.08)}, {4: (8.0, 0.008), 7: (6400.0, 0.64)}
        assert relative_costs([small, large]) == [1.0, 1.0]

    def test_a_slow_worker_is_found(self) -> None:
        slow, quick = relative_costs([{4: (100.0, 4.0)}, {4: (100.0, 1.0)}])
        assert slow == pytest.approx(1.6)
        assert quick == pytest.approx(0.4)
        assert slow / quick == pytest.approx(4.0)

    def test_noise_is_none(self) -> None:
        assert relative_costs([{4: (100.0, 1.0)}, {4: (100.0, SAME_KIND)}]) == [1.0, 1.0]

    def test_who_has_computed_nothing_is_like_the_others(self) -> None:
        assert relative_costs([{}, {4: (100.0, 1.0)}]) == [1.0, 1.0]
        assert relative_costs([]) == []


def simulate(load_at: object, seconds: int, limits: RebalanceSettings) -> list[int]:
    """Two workers, four experts, one layer, under a load that changes. Returns when it moved."""
    held = (frozenset({0, 1}), frozenset({2, 3}))
    rate, pacing = Rate(limits.window), Pacing(limits)
    totals, moves = np.zeros(4), []
    for now in range(seconds):
        totals += np.array(load_at(now))  # type: ignore[operator]
        rate.observe(float(now), totals)
        if now == 0 or now % limits.interval or pacing.is_resting(now):
            continue
        load = rate.per_second()
        assert load is not None
        situation = Situation([load.tolist()], (held,), (0, 0), (1.0, 1.0), 1e-4, 10**6, 1e9)
        plan = make_plan(situation, limits)
        if pacing.should_move(now, plan.is_worth_it and plan.imbalance > limits.threshold):
            sets = [set(each) for each in held]
            for step in plan.steps:
                experts = {expert for _, expert in step.pairs}
                if step.target is not None:
                    sets[step.target] |= experts
                if step.source is not None:
                    sets[step.source] -= experts
            held = (frozenset(sets[0]), frozenset(sets[1]))
            pacing.moved(now)
            moves.append(now)
    return moves


HOT_LEFT, HOT_RIGHT = [100, 100, 1, 1], [1, 1, 100, 100]


class TestPacing:
    LIMITS = RebalanceSettings(interval=60, patience=3, cooldown=180, window=60)

    def test_a_lasting_skew_is_mended_once(self) -> None:
        assert simulate(lambda now: HOT_LEFT, 3600, self.LIMITS) == [180]

    def test_an_even_load_is_left_alone(self) -> None:
        assert simulate(lambda now: [50, 51, 49, 50], 3600, self.LIMITS) == []

    @pytest.mark.parametrize("seconds", [20, 45, 90])
    def test_a_load_that_swings_is_not_run_after(self, seconds: int) -> None:
        """Every two experts are hot for a while, in turn: no placement suits all of them."""
        pairs = list(itertools.combinations(range(4), 2))

        def load_at(now: int) -> list[int]:
            return [100 if expert in pairs[now // seconds % len(pairs)] else 1 for expert in range(4)]

        assert len(simulate(load_at, 7200, self.LIMITS)) <= 2

    def test_a_load_that_shifts_for_good_is_followed(self) -> None:
        shifted = [1, 100, 100, 1]
        moves = simulate(lambda now: HOT_LEFT if now < 1800 else shifted, 3600, self.LIMITS)
        assert 1 <= len(moves) <= 2
        assert moves[0] == 180

    def test_a_burst_moves_nothing(self) -> None:
        assert simulate(lambda now: HOT_LEFT if 600 <= now < 660 else [50] * 4, 3600, self.LIMITS) == []

    def test_after_moves_there_is_a_rest(self) -> None:
        pacing = Pacing(self.LIMITS)
        assert [pacing.should_move(now, True) for now in (0, 60, 120)] == [False, False, True]
        pacing.moved(120)
        assert [pacing.should_move(now, True) for now in (180, 240, 299, 300, 360, 420)] == [False] * 5 + [True]
