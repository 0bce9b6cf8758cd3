"""The router's scheduler on a simulated clock, against times worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokmoe.errors import InvalidRequest
from loadtest.lengths import parse_lengths
from planner.arrivals import Arrival, Load, draw, mean_length, together
from planner.simulation import simulate
from router.step import SchedulerSettings

LIMITS = SchedulerSettings(context_length=1024, max_step_tokens=64, max_running=8)


def test_a_request_alone() -> None:
    """100 tokens of prompt are two steps of at most 64; the second one draws the first token."""
    found = simulate([Arrival(5.0, 100, 4)], LIMITS, 100, 32, lambda shape, here: 1.0)
    (served,) = found.served
    assert (served.ttft, served.tokens, served.tpot, found.end) == (2.0, 4, 1.0, 10.0)
    assert [(shape.rows, shape.draws, shape.read) for shape, _ in found.steps] == [
        (64, 0, 64),
        (36, 1, 100),
        (1, 1, 101),
        (1, 1, 102),
        (1, 1, 103),
    ]


def test_one_who_comes_meanwhile_waits_for_the_step_under_way() -> None:
    found = simulate([Arrival(0.0, 10, 3), Arrival(0.5, 10, 2)], LIMITS, 100, 32, lambda shape, here: 1.0)
    assert [each.first for each in found.served] == [1.0, 2.0]
    assert [each.last for each in found.served] == [3.0, 3.0]
    assert [shape.rows for shape, _ in found.steps] == [10, 11, 2]


def test_a_pause_between_requests_is_no_step() -> None:
    found = simulate([Arrival(0.0, 1, 1), Arrival(100.0, 1, 1)], LIMITS, 100, 32, lambda shape, here: 1.0)
    assert len(found.steps) == 2
    assert found.served[1].ttft == 1.0


def test_one_token_has_no_time_per_token() -> None:
    assert simulate(together(1, 5, 1), LIMITS, 100, 32, lambda shape, here: 1.0).served[0].tpot is None


def test_two_lanes_have_two_steps_under_way() -> None:
    lanes = SchedulerSettings(context_length=1024, max_step_tokens=64, num_lanes=2, min_lane_rows=1)
    seen = []

    def pace(shape, here):
        seen.append(here)
        return 1.0

    simulate(together(4, 10, 20), lanes, 100, 32, pace)
    assert set(seen) == {1, 2}


def test_pages_that_do_not_suffice_preempt() -> None:
    found = simulate(together(6, 31, 60), LIMITS, 9, 32, lambda shape, here: 1.0)
    assert found.preemptions > 0
    assert [each.tokens for each in found.served] == [60] * 6


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        simulate([Arrival(0.0, 2000, 1)], LIMITS, 100, 32, lambda shape, here: 1.0)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.floats(0, 5), st.integers(1, 100), st.integers(1, 12)), min_size=1, max_size=12),
    lanes=st.integers(1, 3),
)
def test_everybody_gets_all_tokens_in_order(lengths, lanes) -> None:
    limits = SchedulerSettings(context_length=1024, max_step_tokens=64, num_lanes=lanes, min_lane_rows=2)
    arrivals = sorted((Arrival(*each) for each in lengths), key=lambda each: each.time)
    found = simulate(arrivals, limits, 60, 32, lambda shape, here: 0.1 + 0.01 * shape.rows)
    for served in found.served:
        assert served.tokens == served.arrival.output
        assert served.first is not None
        assert served.arrival.time < served.first <= served.last <= found.end
    assert sum(shape.draws for shape, _ in found.steps) == sum(each.output for each in arrivals)


def test_arrivals_have_the_rate_and_the_lengths() -> None:
    load = Load(4.0, parse_lengths("uniform:10:30"), parse_lengths("lognormal:50:0.5:1:200"))
    drawn = draw(load, 4000, 3, 10_000)
    assert drawn[-1].time == pytest.approx(1000, rel=0.05)
    assert {each.prompt for each in drawn} == set(range(10, 31))
    assert mean_length(load.output) == pytest.approx(sum(each.output for each in drawn) / 4000, rel=0.03)
    assert draw(load, 50, 3, 10_000) == draw(load, 50, 3, 10_000) != draw(load, 50, 4, 10_000)


def test_arrivals_never_outgrow_the_context() -> None:
    load = Load(1.0, parse_lengths("uniform:10:3000"), parse_lengths("uniform:10:3000"))
    assert all(each.prompt >= 1 and each.output >= 1 for each in draw(load, 500, 0, 1000))
    assert max(each.prompt + each.output for each in draw(load, 500, 0, 1000)) <= 1000
