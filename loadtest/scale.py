"""Values to places in a chart, and the round numbers beside them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 12, 44
"""Of a chart and its margins, in the units of its view box."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """is_log: decades instead of a linear scale; values at or below 0 are left out.

    is_tight: it ends with the values, not at a round number.
    """

    label: str
    is_log: bool = False
    is_tight: bool = False
    low: float | None = None
    high: float | None = None


class Scale:
    """Values to pixels."""

    def __init__(self, axis: Axis, values: Sequence[float], begin: float, end: float) -> None:
        usable = [value for value in values if math.isfinite(value) and (value > 0 or not axis.is_log)]
        low = axis.low if axis.low is not None else min(usable, default=0.0)
        high = axis.high if axis.high is not None else max(usable, default=1.0)
        if axis.is_log:
            low, high = max(low, 1e-9), max(high, 1e-9)
            self.ticks = log_ticks(low, high)
        else:
            self.ticks = ticks(low, high)
        if axis.is_tight and high > low:
            self.low, self.high = low, high
            self.ticks = [tick for tick in self.ticks if low <= tick <= high]
        else:
            self.low, self.high = min(low, self.ticks[0]), max(high, self.ticks[-1])
        self._begin, self._end, self._is_log = begin, end, axis.is_log

    def __call__(self, value: float) -> float:
        if self._is_log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self._begin + min(1.0, max(0.0, share)) * (self._end - self._begin)

    def shows(self, value: float) -> bool:
        """Whether the axis has a place for it."""
        return math.isfinite(value) and (value > 0 or not self._is_log)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover the range: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that cover the range; in a narrow one with 2 and 5 between them, no more than it takes."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    if last - first > 3:
        return [10.0**power for power in range(first, last + 1)]
    found = [factor * 10.0**power for power in range(first, last) for factor in (1, 2, 5)] + [10.0**last]
    begin = max(index for index, tick in enumerate(found[:-1]) if tick <= low * (1 + 1e-9) or not index)
    end = min(index for index, tick in enumerate(found) if tick >= high * (1 - 1e-9) or index == len(found) - 1)
    return found[begin : max(end, begin + 1) + 1]


def number(value: float) -> str:
    """Three digits, with k and M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
