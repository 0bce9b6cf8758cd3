"""A straight line through measured points, and whether they lie on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

STRAIGHT_WITHIN = 0.15
"""Share of a point's value that it may lie beside the line and the points are still called straight: about what a quiet
machine leaves in a median of three."""


@dataclasses.dataclass(frozen=True)
class Line:
    """y = intercept + slope x. r2: share of the variance that the line explains. worst: the largest distance of a point
    from the line, as a share of the point's value; worst_x: where that is.
    """

    intercept: float
    slope: float
    r2: float
    worst: float
    worst_x: float

    @property
    def is_straight(self) -> bool:
        """Whether every point is near the line."""
        return self.worst <= STRAIGHT_WITHIN

    def at(self, x: float) -> float:
        """The line's value."""
        return self.intercept + self.slope * x


def fit(points: Sequence[tuple[float, float]]) -> Line | None:
    """Least squares on (x, y), each point's distance weighted by one over its value, so that small values count as much
    as large ones. None for fewer than three different x, through which there is always a line, or values that are not
    positive.
    """
    if len({x for x, _ in points}) < 3 or any(y <= 0 for _, y in points):
        return None
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)) / spread
    intercept = mean_y - slope * mean_x
    away = [(abs(y - intercept - slope * x) / y, x) for x, y in points]
    variance = sum(w * (y - mean_y) ** 2 for w, (_, y) in zip(weights, points, strict=True))
    unexplained = sum(share**2 for share, _ in away)
    r2 = 1 - unexplained / variance if variance > unexplained else float(variance == unexplained == 0)
    worst, worst_x = max(away)
    return Line(intercept, slope, r2, worst, worst_x)
