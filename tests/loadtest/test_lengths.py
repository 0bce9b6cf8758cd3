"""Distributions of lengths, and how they are written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokmoe.errors import ConfigError
from loadtest.lengths import Lengths, around, fixed, parse_lengths


@pytest.mark.parametrize("text", ["128", "fixed:128"])
def test_a_number_is_always_that(text) -> None:
    assert set(parse_lengths(text).draw(np.random.default_rng(0), 50)) == {128}


@given(low=st.integers(1, 100), extra=st.integers(0, 100), seed=st.integers(0, 999))
def test_uniform_has_both_ends_and_nothing_beyond(low, extra, seed) -> None:
    drawn = parse_lengths(f"uniform:{low}:{low + extra}").draw(np.random.default_rng(seed), 4000)
    assert (drawn.min(), drawn.max()) == (low, low + extra)


def test_lognormal_has_its_median_and_sigma() -> None:
    drawn = parse_lengths("lognormal:200:0.5").draw(np.random.default_rng(1), 20_000)
    assert np.median(drawn) == pytest.approx(200, rel=0.03)
    assert np.log(drawn).std() == pytest.approx(0.5, rel=0.03)


def test_lognormal_keeps_within_its_bounds() -> None:
    drawn = parse_lengths("lognormal:200:2:50:300").draw(np.random.default_rng(1), 1000)
    assert (drawn.min(), drawn.max()) == (50, 300)


def test_a_range_ratio_goes_both_ways() -> None:
    assert (around(100, 0.2).low, around(100, 0.2).high) == (80, 120)
    assert around(100, 0.0) == Lengths("uniform", 100, 100)
    assert fixed(3).high == 3


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "many", "uniform:5", "uniform:9:5", "lognormal:0:1", "lognormal:5:-1", "normal:5:5", "uniform:1:x"],
)
def test_what_is_no_distribution_is_refused(text) -> None:
    with pytest.raises(ConfigError):
        parse_lengths(text)


def test_a_ratio_that_reaches_zero_is_refused() -> None:
    with pytest.raises(ConfigError):
        around(100, 1.0)
