"""Percentiles and how sure they are: the bootstrap of Efron, by drawing the sample anew from itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Statistic = Callable[[Values], Values]
"""From samples, one per row, to one value per row."""

NUM_RESAMPLES = 1000
"""Draws of a bootstrap: the ends of a 95 % interval are then the 25th from either end."""

MOST_DRAWN = 20_000_000
"""Values drawn for one interval at most; larger samples are drawn fewer times, and need it less."""

FEWEST_RESAMPLES = 200

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """Where a statistic lies, with `CONFIDENCE`."""

    low: float
    high: float


def mean(values_RN: Values) -> Values:
    """Of each row."""
    means_R: Values = values_RN.mean(axis=-1)
    return means_R


def percentile(share: float) -> Statistic:
    """Of each row; `share` in percent, interpolated between the two nearest values."""

    def of_rows(values_RN: Values) -> Values:
        return np.percentile(values_RN, share, axis=-1)

    return of_rows


def resample(values_N: Values, statistic: Statistic, seed: int, num: int = NUM_RESAMPLES) -> Values:
    """The statistic of `num` samples that are drawn from the sample, with putting back."""
    rng = np.random.default_rng(seed)
    size = len(values_N)
    num = min(num, max(FEWEST_RESAMPLES, MOST_DRAWN // max(1, size)))
    rows = max(1, 1_000_000 // max(1, size))  # at a time, so that no draw takes more than some megabytes
    parts = []
    for begin in range(0, num, rows):
        index_RN = rng.integers(0, size, (min(rows, num - begin), size))
        parts.append(statistic(values_N[index_RN]))
    return np.concatenate(parts)


def interval(values: Sequence[float] | Values, statistic: Statistic, seed: int = 0) -> Interval | None:
    """Percentile bootstrap. None for fewer than two values, which say nothing of their spread."""
    values_N = np.asarray(values, np.float64)
    if len(values_N) < 2:
        return None
    return between(resample(values_N, statistic, seed))


def between(estimates: Values) -> Interval:
    """The middle `CONFIDENCE` of the estimates."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(estimates, [tail, 100 - tail])
    return Interval(float(low), float(high))


def difference(
    before: Sequence[float] | Values, after: Sequence[float] | Values, statistic: Statistic, seed: int = 0
) -> Interval | None:
    """Of the statistic, after less before, of two samples that know nothing of each other."""
    if len(before) < 2 or len(after) < 2:
        return None
    # Each side with draws of its own: the same draws would tie the two samples together.
    befores = resample(np.asarray(before, np.float64), statistic, 2 * seed)
    afters = resample(np.asarray(after, np.float64), statistic, 2 * seed + 1)
    num = min(len(befores), len(afters))
    return between(afters[:num] - befores[:num])
