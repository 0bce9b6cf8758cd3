"""A cluster worker by worker: times worked out by hand, failures of every role, thousands of workers."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokmoe.errors import ConfigError
from loadtest.lengths import fixed, parse_lengths
from planner.arrivals import Load
from planner.bounds import Goals, Limits
from planner.cluster import SharedHost
from planner.costs import Costs, RouterCosts
from planner.shape import decode, prefill
from planner.simulated.failures import Failure
from planner.simulated.results import Outcome
from planner.simulated.run import simulate
from planner.simulated.scenario import Scenario
from planner.step_time import StepTimer
from tests.planner.worked import CONFIG, IDEAL, cluster, nothing_but_roofs

LIMITS = Limits(max_step_tokens=64, max_running=64, min_lane_rows=8)
COSTS = dataclasses.replace(
    IDEAL,
    router=nothing_but_roofs(RouterCosts, per_layer=1e-4, per_message=2e-4, per_step=1e-3, per_row=1e-5, per_draw=1e-5),
    round_trip=1e-4,
)


def scenario(costs: Costs = COSTS, rate: float = 1.0, seconds: float = 1.0, failures=(), **changes) -> Scenario:
    fields = {"skew", "reach", "seed"}
    others = {name: changes.pop(name) for name in fields & changes.keys()}
    load = Load(rate, changes.pop("prompt", fixed(40)), changes.pop("output", fixed(10)))
    goals = changes.pop("goals", Goals(math.inf, math.inf, 1.0))
    return Scenario(
        cluster=cluster(changes.pop("cards", 1), **changes),
        costs=costs,
        load=load,
        limits=LIMITS,
        goals=goals,
        seconds=seconds,
        failures=tuple(failures),
        **others,
    )


@pytest.mark.parametrize("changes", [{}, {"has_router_inside": True}, {"rows_by_pairs": True}])
def test_a_request_alone_takes_what_the_formulas_say(changes) -> None:
    """One card has all experts, so nothing is left to chance but which two of them a token reads."""
    asked = scenario(**changes)
    found = simulate(asked)
    timer = StepTimer(asked.cluster, COSTS)
    assert found.requests == 1
    assert found.ttft_p50 == pytest.approx(timer.time(prefill(40)).alone, rel=1e-6)
    steps = [timer.time(decode(1, context)).alone for context in range(41, 50)]
    assert found.tpot_p50 == pytest.approx(sum(steps) / 9, rel=1e-6)
    assert (found.num_steps, found.retries, found.moves, found.unfinished) == (10, 0, 0, 0)


def test_what_is_busy_is_told() -> None:
    asked = scenario()
    found = simulate(asked)
    time = StepTimer(asked.cluster, COSTS)
    shapes = [prefill(40), *(decode(1, context) for context in range(41, 50))]
    for name, busy in (("attention", "busy_attention"), ("router", "busy_router"), ("experts", "busy_experts")):
        seconds = sum(getattr(time.time(shape), busy) for shape in shapes)
        assert found.busy[name] == pytest.approx((seconds / found.seconds,) * 2, rel=1e-6), name


def test_lanes_overlap_and_do_not_cost_more_than_they_save() -> None:
    slow_wire = dataclasses.replace(COSTS, round_trip=5e-3)
    rates = [simulate(scenario(slow_wire, rate=60.0, seconds=2.0, lanes=lanes)).output_rate for lanes in (1, 2)]
    assert rates[1] > 1.3 * rates[0]


def lost(role: str, at: float, lasts: float | None, index: int = 0) -> Failure:
    return Failure(at, role, index, lasts)


def test_an_expert_worker_that_is_lost_costs_no_request_where_there_is_another_copy() -> None:
    asked = {"rate": 30.0, "seconds": 4.0, "cards": 2, "copies": 2}
    calm, hit = simulate(scenario(**asked)), simulate(scenario(failures=[lost("expert", 2.0, None)], **asked))
    assert hit.retries >= 1
    assert hit.unfinished == 0
    (effect,) = hit.effects
    assert effect.under_way > 0
    assert effect.longest_stall < 0.1 + 3 * calm.tpot_p99
    assert hit.output_rate == pytest.approx(calm.output_rate, rel=0.15)


def test_without_another_copy_steps_wait_until_it_is_back() -> None:
    found = simulate(scenario(rate=30.0, seconds=4.0, cards=2, failures=[lost("expert", 2.0, 0.7)]))
    assert found.unfinished == 0
    (effect,) = found.effects
    assert 0.7 <= effect.longest_stall < 1.2
    assert effect.dip == 0
    assert effect.recovered_after is not None
    never = simulate(scenario(rate=30.0, seconds=4.0, cards=2, failures=[lost("expert", 2.0, None)]))
    assert never.unfinished > 0
    assert not never.holds


def test_an_attention_worker_that_is_lost_gives_its_sequences_to_the_other() -> None:
    two = {"rate": 30.0, "seconds": 4.0, "attention_workers": 2, "copies": 2}
    found = simulate(scenario(failures=[lost("attention", 2.0, None)], **two))
    assert found.moves > 0
    assert found.unfinished == 0
    alone = simulate(scenario(rate=30.0, seconds=4.0, failures=[lost("attention", 2.0, 0.5)]))
    assert alone.unfinished == 0
    assert alone.effects[0].longest_stall >= 0.5, "nobody else was there"


def test_a_router_that_is_lost_sends_its_clients_to_the_other() -> None:
    two = {"rate": 30.0, "seconds": 4.0, "attention_workers": 2, "routers": 2, "copies": 2}
    found = simulate(scenario(failures=[lost("router", 2.0, 1.0, index=1)], **two))
    assert found.moves > 0
    assert found.unfinished == 0
    none_left = [lost("router", 2.0, 0.6, index=index) for index in (0, 1)]
    assert simulate(scenario(failures=none_left, **two)).unfinished == 0


def test_an_attention_worker_with_a_router_inside_is_lost_with_it() -> None:
    """So its clients go elsewhere, instead of waiting for it."""
    two = {"rate": 30.0, "seconds": 4.0, "attention_workers": 2, "routers": 2, "copies": 2}
    asked = scenario(failures=[lost("attention", 2.0, None)], has_router_inside=True, **two)
    assert simulate(asked).unfinished == 0
    with pytest.raises(ConfigError, match="there are 0"):
        scenario(failures=[lost("router", 2.0, None)], has_router_inside=True, **two)


def test_a_worker_that_is_lost_with_its_router_stays_lost_when_the_router_is_back() -> None:
    failures = [lost("attention", 1.0, 3.0), lost("router", 1.5, 0.5)]
    found = simulate(scenario(rate=10.0, seconds=3.0, failures=failures))
    assert found.unfinished == 0
    assert found.effects[0].longest_stall >= 3.0 or found.ttft_p99 >= 1.0


@settings(max_examples=25, deadline=None)
@given(
    failures=st.lists(
        st.builds(
            lost,
            st.sampled_from(["expert", "attention", "router"]),
            st.floats(0, 1.5),
            st.floats(0.001, 0.8),
            st.integers(0, 1),
        ),
        max_size=6,
    ),
    lanes=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_whatever_fails_and_comes_back_everybody_gets_all_tokens(failures, lanes, seed) -> None:
    found = simulate(
        scenario(
            rate=20.0,
            seconds=1.5,
            output=parse_lengths("uniform:1:12"),
            cards=2,
            attention_workers=2,
            routers=2,
            lanes=lanes,
            seed=seed,
            failures=sorted(failures),
        )
    )
    assert found.unfinished == 0


def test_a_skewed_routing_keeps_some_cards_busier() -> None:
    def spread(found: Outcome) -> float:
        mean, most = found.busy["experts"]
        return most / mean

    slow = dataclasses.replace(COSTS, experts={"cuda": dataclasses.replace(IDEAL.experts["cuda"], flops=1e-3)})
    even, skewed = (simulate(scenario(slow, rate=20.0, cards=4, skew=skew)) for skew in (0.0, 3.0))
    assert skewed.ttft_p50 > even.ttft_p50
    assert spread(skewed) > spread(even) * 0.9, "which expert is popular differs from layer to layer"


def test_a_router_asks_those_only_that_it_reaches() -> None:
    """The second copy is lost for good: only a router that reaches it notices."""
    far = {"rate": 30.0, "seconds": 2.0, "copies": 2, "failures": [lost("expert", 0.5, None, index=1)]}
    assert simulate(scenario(reach=1, **far)).busy["experts"][1] > 0
    assert simulate(scenario(reach=1, **far)).retries == 0
    assert simulate(scenario(reach=2, **far)).unfinished == 0


def test_thousands_of_workers() -> None:
    found = simulate(
        scenario(
            rate=400.0, seconds=0.5, cards=4, copies=512, attention_workers=256, routers=256, reach=4,
            failures=[lost("expert", 0.2, 0.1, index) for index in range(0, 2048, 64)],
        )
    )  # fmt: skip
    assert found.requests == 200
    assert found.unfinished == 0
    assert len(found.effects) == 32


def test_what_cannot_be_simulated() -> None:
    with pytest.raises(ConfigError, match="there are 1"):
        scenario(failures=[lost("router", 1.0, None, index=1)])
    for changes in ({"link": 0.0}, {"host": SharedHost(2, 1)}):
        with pytest.raises(ConfigError, match="devices of their own"):
            scenario(**changes)


def test_a_simulation_repeats() -> None:
    asked = scenario(rate=30.0, cards=2, copies=2, seed=5, failures=[lost("expert", 0.5, 0.2)])
    one, other = (dataclasses.replace(simulate(asked), took=0.0) for _ in range(2))
    assert one == other
    assert CONFIG.num_experts == 4, "which the numbers of workers above go by"
