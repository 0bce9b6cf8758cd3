"""Schedules have the statistics that they are named for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokmoe.errors import ConfigError
from loadtest.arrivals import constant_times, gamma_times, ramp_times, trace_times

NUM = 20_000


def kolmogorov(values, cdf):
    """The largest distance between the values' distribution and another."""
    ordered = np.sort(values)
    expected = np.asarray([cdf(value) for value in ordered])
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())


CRITICAL = 1.63 / math.sqrt(NUM)
"""Kolmogorov and Smirnov's distance that one of a hundred right samples is above."""


@pytest.mark.parametrize("seed", range(3))
def test_gaps_of_a_poisson_process_are_exponential(seed) -> None:
    gaps = np.diff(gamma_times(NUM + 1, 8.0, 1.0, seed))
    assert kolmogorov(gaps, lambda gap: 1 - math.exp(-8.0 * gap)) < CRITICAL
    assert kolmogorov(gaps, lambda gap: 1 - math.exp(-9.0 * gap)) > CRITICAL  # the test can tell


@pytest.mark.parametrize("seed", range(3))
def test_counts_of_a_poisson_process_are_poisson(seed) -> None:
    """Chi-square over the number of arrivals in spans where two are expected."""
    times = gamma_times(NUM, 10.0, 1.0, seed)
    counts = np.histogram(times, np.arange(0, times[-1], 0.2))[0]
    expected = np.asarray([math.exp(-2) * 2**k / math.factorial(k) for k in range(7)])
    expected = np.append(expected, 1 - expected.sum()) * len(counts)
    observed = np.bincount(np.minimum(counts, 7), minlength=8)
    assert ((observed - expected) ** 2 / expected).sum() < 18.48  # 1 % of chi-square with 7 degrees of freedom


def test_gaps_of_burstiness_four_are_gamma() -> None:
    def erlang(gap):
        x = 8.0 * 4 * gap
        return 1 - math.exp(-x) * sum(x**k / math.factorial(k) for k in range(4))

    assert kolmogorov(np.diff(gamma_times(NUM + 1, 8.0, 4.0, 1)), erlang) < CRITICAL


@given(rate=st.floats(0.1, 1000), burstiness=st.sampled_from([0.25, 1.0, 4.0, 25.0]), seed=st.integers(0, 2**32 - 1))
def test_the_mean_is_the_rate_and_the_spread_the_burstiness(rate, burstiness, seed) -> None:
    times = gamma_times(4000, rate, burstiness, seed)
    gaps = np.diff(times, prepend=0.0)
    assert np.all(gaps >= 0)
    spread = 1 / math.sqrt(burstiness)
    assert gaps.mean() * rate == pytest.approx(1.0, abs=6 * spread / math.sqrt(4000))
    assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.35)


def test_the_same_seed_is_the_same_schedule() -> None:
    assert np.array_equal(gamma_times(100, 3.0, 1.0, 7), gamma_times(100, 3.0, 1.0, 7))
    assert not np.array_equal(gamma_times(100, 3.0, 1.0, 7), gamma_times(100, 3.0, 1.0, 8))


@given(num=st.integers(1, 300), rate=st.floats(0.1, 1000), seed=st.integers(0, 999))
def test_the_last_is_due_when_the_rate_says(num, rate, seed) -> None:
    times = gamma_times(num, rate, 1.0, seed)
    assert times[-1] == pytest.approx(num / rate)
    assert np.all(np.diff(times) >= 0)


def test_an_infinite_rate_is_all_at_once() -> None:
    assert not gamma_times(5, math.inf, 1.0, 0).any()


def test_constant_gaps() -> None:
    assert constant_times(4, 2.0).tolist() == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
def test_a_ramp_begins_and_ends_at_its_rates(strategy) -> None:
    gaps = np.diff(ramp_times(NUM, 10.0, 1000.0, strategy, 1.0, 3), prepend=0.0)
    share = NUM // 50
    middle = {"linear": 505.0, "exponential": 100.0}[strategy]
    for part, rate in (
        (gaps[: share // 4], 10.0),
        (gaps[NUM // 2 - share : NUM // 2 + share], middle),
        (gaps[-share:], 1000.0),
    ):
        assert 1 / part.mean() == pytest.approx(rate, rel=0.35)


def test_a_linear_ramp_can_begin_at_nothing() -> None:
    assert np.isfinite(ramp_times(10, 0.0, 5.0, "linear", 1.0, 0)).all()


def test_a_trace_begins_at_zero_and_can_be_sped_up() -> None:
    assert trace_times([5.0, 6.0, 8.0], 2.0).tolist() == [0.0, 0.5, 1.5]


@pytest.mark.parametrize(
    "make",
    [
        lambda: gamma_times(1, 0.0, 1.0, 0),
        lambda: gamma_times(1, math.nan, 1.0, 0),
        lambda: gamma_times(1, 1.0, 0.0, 0),
        lambda: constant_times(1, -1.0),
        lambda: ramp_times(9, 5.0, 1.0, "linear", 1.0, 0),
        lambda: ramp_times(9, 0.0, 1.0, "exponential", 1.0, 0),
        lambda: ramp_times(9, 1.0, 2.0, "sideways", 1.0, 0),
        lambda: trace_times([2.0, 1.0]),
        lambda: trace_times([1.0], 0.0),
    ],
)
def test_what_cannot_be_is_refused(make) -> None:
    with pytest.raises(ConfigError):
        make()
