"""The bootstrap covers what it should, as often as it should."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest import statistics
from loadtest.statistics import difference, interval, mean, percentile, resample


@pytest.mark.parametrize(
    ("statistic", "truth"), [(mean, 1.0), (percentile(50), np.log(2)), (percentile(90), np.log(10))]
)
def test_an_interval_has_the_truth_in_it_most_of_the_time(statistic, truth) -> None:
    """Of 100 exponential samples about 95 intervals; with a bootstrap of 100 values somewhat fewer."""
    rng = np.random.default_rng(1)
    found = [interval(rng.exponential(1.0, 100), statistic, seed) for seed in range(100)]
    covered = sum(each.low <= truth <= each.high for each in found)
    assert 85 <= covered <= 100
    assert all(each.high - each.low < 2.5 for each in found)


def test_the_interval_of_a_mean_is_the_textbooks() -> None:
    values = np.random.default_rng(0).normal(10.0, 2.0, 2000)
    found = interval(values, mean)
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - error, abs=0.02)
    assert found.high == pytest.approx(values.mean() + error, abs=0.02)


def test_no_difference_is_mostly_not_found() -> None:
    rng = np.random.default_rng(2)
    found = [difference(rng.normal(5, 1, 80), rng.normal(5, 1, 80), mean, seed) for seed in range(100)]
    assert sum(each.low > 0 or each.high < 0 for each in found) <= 12


def test_a_difference_is_found() -> None:
    rng = np.random.default_rng(3)
    found = difference(rng.normal(5, 1, 200), rng.normal(6, 1, 200), mean)
    assert 0.5 < found.low < 1.0 < found.high < 1.5


def test_a_value_alone_has_no_interval() -> None:
    assert interval([1.0], mean) is None
    assert difference([1.0], [1.0, 2.0], mean) is None


def test_large_samples_are_drawn_fewer_times(monkeypatch) -> None:
    monkeypatch.setattr(statistics, "MOST_DRAWN", 300_000)
    assert len(resample(np.arange(1000.0), mean, 0)) == 300
    assert len(resample(np.arange(10_000.0), mean, 0)) == statistics.FEWEST_RESAMPLES


def test_the_seed_decides() -> None:
    values = np.arange(50.0)
    assert interval(values, mean, 1) == interval(values, mean, 1)
    assert interval(values, mean, 1) != interval(values, mean, 2)
