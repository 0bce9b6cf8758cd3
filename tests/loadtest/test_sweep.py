"""The search finds a known capacity, and always ends."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from grokmoe.errors import ConfigError
from loadtest.sweep import Sweep, holds


def run(sweep: Sweep, does_hold) -> list[float]:
    rates = []
    while (rate := sweep.next_rate()) is not None:
        rates.append(rate)
        sweep.add(rate, does_hold(rate))
    return rates


def told(verdicts):
    """One after the other, whatever the rate."""
    left = iter(verdicts)
    return lambda rate: next(left)


@given(start=st.floats(0.1, 500), capacity=st.floats(0.05, 2000), tolerance=st.sampled_from([0.02, 0.1, 0.3]))
def test_it_finds_the_capacity(start, capacity, tolerance) -> None:
    sweep = Sweep(start, tolerance=tolerance, max_steps=60)
    rates = run(sweep, lambda rate: rate <= capacity)
    assert len(rates) == len(set(rates))
    assert sweep.held <= capacity < sweep.failed
    assert sweep.failed <= sweep.held * (1 + tolerance) * (1 + 1e-9)


@given(start=st.floats(0.1, 500), verdicts=st.lists(st.booleans(), min_size=40, max_size=40))
def test_it_ends_whatever_the_verdicts(start, verdicts) -> None:
    sweep = Sweep(start, max_steps=12)
    rates = run(sweep, told(verdicts))
    assert 1 <= len(rates) <= 12
    assert all(rate > 0 for rate in rates)


@given(verdicts=st.lists(st.booleans(), min_size=12, max_size=12))
def test_what_held_is_below_what_failed(verdicts) -> None:
    sweep = Sweep(10.0)
    run(sweep, told(verdicts))
    assume(sweep.held)
    assert sweep.held < sweep.failed


def test_the_climb_doubles_then_halves_the_rest_geometrically() -> None:
    sweep = Sweep(1.0, max_steps=5)
    assert run(sweep, lambda rate: rate <= 5) == pytest.approx([1, 2, 4, 8, math.sqrt(32)])


def test_it_stops_at_the_highest_and_the_lowest() -> None:
    assert run(Sweep(1.0, highest=3.0), lambda rate: True) == [1.0, 2.0, 3.0]
    assert run(Sweep(1.0, lowest=0.3), lambda rate: False) == [1.0, 0.5]


@pytest.mark.parametrize("wrong", [{"start": 0.0}, {"factor": 1.0}, {"tolerance": 0.0}, {"max_steps": 0}])
def test_searches_that_cannot_be(wrong) -> None:
    with pytest.raises(ConfigError):
        Sweep(**{"start": 1.0, **wrong})


def test_a_rate_holds_if_the_objectives_do_and_no_queue_grows() -> None:
    figures = {"slo_holds": True, "request_throughput": 9.0, "duration": 10.0, "scheduled": 100}
    assert holds(figures)
    assert not holds({**figures, "scheduled": 101})
    assert not holds({**figures, "slo_holds": False})
