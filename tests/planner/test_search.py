"""Bounds, forecasts and the search, on the worked cluster."""

from __future__ import annotations

import dataclasses
import math

import pytest

from grokmoe.errors import ConfigError
from loadtest.lengths import fixed
from planner.arrivals import Arrival, Load
from planner.bounds import Goals, Limits, batches, bound, steady_shape
from planner.device import Group
from planner.forecast import forecast, is_good, kv_tokens
from planner.search import Wish, clusters, layouts, price_per_million, search
from planner.shape import decode
from planner.simulation import Served
from planner.step_time import StepTimer
from tests.planner.worked import CONFIG, DEVICE, IDEAL, cluster

LIMITS = Limits(max_step_tokens=256, max_running=64, min_lane_rows=8)
GOALS = Goals(ttft=0.5, tpot=0.05, share=0.9)

WISH = Wish(
    config=CONFIG,
    dtype="bfloat16",
    expert_dtype="bfloat16",
    attention=Group(DEVICE),
    experts=(Group(DEVICE),),
    link=1e9,
    round_trip=None,
    kv_gib=1.0,
    load=Load(0.0, fixed(40), fixed(20)),
    goals=GOALS,
    limits=LIMITS,
    num_requests=150,
)


def with_rate(rate: float, **changes) -> Wish:
    return dataclasses.replace(WISH, load=Load(rate, fixed(40), fixed(20)), **changes)


def test_batches() -> None:
    assert batches(13) == [1, 2, 3, 4, 6, 8, 12, 13]
    assert batches(1) == [1]


def test_a_steady_step() -> None:
    shape = steady_shape(20, 40, 20)
    assert (shape.rows, shape.draws) == (20 + 40, 20 + 1)
    assert shape.attended == 20 * 50 + 1 * 800


def test_the_bound_is_littles_law() -> None:
    timer = StepTimer(cluster(), IDEAL)
    found = bound(timer, 40, 20, LIMITS, 1e9, Goals(math.inf, math.inf, 1.0))
    assert found.batch == 64
    assert found.step == timer.in_flight(steady_shape(64, 40, 20), 1, 1)
    assert found.rate == pytest.approx(64 / (20 * found.step))


@pytest.mark.parametrize(("changes", "batch"), [({"max_running": 10}, 10), ({"max_step_tokens": 30}, 10)])
def test_the_bound_keeps_within_the_routers_limits(changes, batch) -> None:
    limits = dataclasses.replace(LIMITS, **changes)
    found = bound(StepTimer(cluster(), IDEAL), 40, 20, limits, 1e9, Goals(math.inf, math.inf, 1.0))
    assert found.batch == batch


def test_the_bound_keeps_within_pages_and_goals() -> None:
    timer = StepTimer(cluster(), IDEAL)
    assert bound(timer, 40, 20, LIMITS, 5 * 60, Goals(math.inf, math.inf, 1.0)).batch == 5
    whole = bound(timer, 40, 20, LIMITS, 1e9, Goals(math.inf, math.inf, 1.0))
    tight = bound(timer, 40, 20, LIMITS, 1e9, Goals(math.inf, whole.step * 0.9, 1.0))
    assert 0 < tight.rate < whole.rate
    assert tight.step <= whole.step * 0.9
    assert bound(timer, 40, 20, LIMITS, 1e9, Goals(math.inf, 1e-9, 1.0)).rate == 0


def test_a_forecast_of_little_load_is_a_request_alone() -> None:
    timer = StepTimer(cluster(), IDEAL)
    found = forecast(timer, Load(0.001, fixed(40), fixed(20)), LIMITS, GOALS, 40, 0)
    alone = timer.time(decode(1, 50)).alone
    assert found.holds
    assert found.tpot_p99 == pytest.approx(alone, rel=0.05)
    assert found.busy < 0.01
    assert found.output_rate == pytest.approx(0.02, rel=0.5)


def test_a_forecast_above_the_bound_does_not_hold() -> None:
    timer = StepTimer(cluster(), IDEAL)
    most = bound(timer, 40, 20, LIMITS, kv_tokens(timer), Goals(math.inf, math.inf, 1.0)).rate
    found = forecast(timer, Load(most * 2, fixed(40), fixed(20)), LIMITS, GOALS, 3000, 0)
    assert not found.holds
    assert found.ttft_p99 > GOALS.ttft
    assert found.busy > 0.95


def test_who_is_good() -> None:
    arrival = Arrival(1.0, 1, 3)
    assert is_good(Served(arrival, 1.5, 1.58, 3), GOALS)
    assert not is_good(Served(arrival, 1.6, 1.7, 3), GOALS), "late"
    assert not is_good(Served(arrival, 1.5, 1.7, 3), GOALS), "slow"
    assert is_good(Served(arrival, 1.5, 1.5, 1), GOALS)
    assert not is_good(Served(arrival), GOALS)


def test_layouts_are_the_fewest_and_those_that_divide() -> None:
    small = dataclasses.replace(DEVICE, memory=1.5)
    assert [len(each.cards) for each in layouts(with_rate(1.0))] == [1, 2, 4]
    with pytest.raises(ConfigError, match="no memory for one expert"):
        layouts(with_rate(1.0, experts=(Group(small),)))
    with pytest.raises(ConfigError, match="3 are needed"):
        layouts(with_rate(1.0, copies=3, experts=(Group(DEVICE, 2),)))
    with pytest.raises(ConfigError, match="does not compute in float8"):
        layouts(with_rate(1.0, expert_dtype="float8"))


def test_clusters_come_the_cheapest_first_and_keep_to_what_is_given() -> None:
    prices = [each.price for each in clusters(with_rate(1.0))]
    assert prices == sorted(prices)
    given = with_rate(1.0, attention=Group(DEVICE, 2), experts=(Group(DEVICE, 6),), lanes=2, copies=2, routers=1)
    made = list(clusters(given))
    assert made
    for each in made:
        assert each.attention_workers <= 2
        assert each.num_cards <= 6
        assert (each.lanes, each.routers) == (2, 1)
        assert each.copies >= 2


def test_the_search_finds_the_cheapest_that_holds() -> None:
    one = search(with_rate(20.0), IDEAL)
    many = search(with_rate(2000.0), IDEAL)
    assert one.holds
    assert many.holds
    assert one.cluster.price < many.cluster.price
    assert price_per_million(many) < price_per_million(one), "a full cluster is cheaper by the token"
    cheaper = [each for each in clusters(with_rate(2000.0)) if each.price < many.cluster.price * 0.999]
    timers = [StepTimer(each, IDEAL) for each in cheaper[-12:]]
    bounds = [bound(timer, 40, 20, LIMITS, kv_tokens(timer), GOALS).rate for timer in timers]
    assert all(rate < 2000 * 1.2 for rate in bounds), "nothing cheaper has much to spare"


def test_a_load_that_nothing_serves_is_said_to_fail() -> None:
    given = with_rate(1e6, attention=Group(DEVICE, 1), experts=(Group(DEVICE, 2),))
    found = search(given, IDEAL)
    assert not found.holds
    assert found.bound.rate < 1e6


def test_without_a_rate_more_devices_serve_more() -> None:
    few = search(dataclasses.replace(WISH, attention=Group(DEVICE, 1), experts=(Group(DEVICE, 1),)), IDEAL)
    more = search(dataclasses.replace(WISH, attention=Group(DEVICE, 4), experts=(Group(DEVICE, 8),)), IDEAL)
    assert few.forecast.output_rate < more.forecast.output_rate


def test_goals_that_no_batch_keeps_are_said_to_fail() -> None:
    found = search(dataclasses.replace(WISH, goals=Goals(1e-9, 1e-9, 0.9)), IDEAL)
    assert not found.holds
    assert found.bound.rate == 0
