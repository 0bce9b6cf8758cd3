"""Straight lines through measured points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scaling.line import STRAIGHT_WITHIN, fit

positive = st.floats(0.01, 1000.0)
axis = st.lists(st.integers(1, 10_000), min_size=3, max_size=12, unique=True)


@given(axis, positive, positive)
def test_points_on_a_line_give_it_back(xs: list[int], intercept: float, slope: float) -> None:
    line = fit([(x, intercept + slope * x) for x in xs])
    assert line is not None
    assert line.is_straight
    for x in xs:
        assert line.at(x) == pytest.approx(intercept + slope * x, rel=1e-6)


@given(axis, positive, positive, st.floats(0.1, 100.0))
def test_the_unit_of_y_changes_nothing_else(xs: list[int], intercept: float, slope: float, unit: float) -> None:
    points = [(x, intercept + slope * x * (1 + place % 3)) for place, x in enumerate(xs)]
    line, other = fit(points), fit([(x, y * unit) for x, y in points])
    assert line is not None
    assert other is not None
    assert other.slope == pytest.approx(line.slope * unit, rel=1e-6, abs=1e-9)
    assert other.worst == pytest.approx(line.worst, rel=1e-6, abs=1e-9)


def test_a_square_is_not_straight() -> None:
    line = fit([(x, x * x) for x in (1, 2, 4, 8, 16, 32)])
    assert line is not None
    assert not line.is_straight
    assert line.worst > STRAIGHT_WITHIN
    assert line.r2 < 0.9


def test_one_point_beside_the_line_is_named() -> None:
    points = [(x, 10.0 + x) for x in range(1, 10)]
    points[4] = (5, 30.0)
    line = fit(points)
    assert line is not None
    assert line.worst_x == 5
    assert not line.is_straight


@pytest.mark.parametrize("points", [[], [(1, 1.0), (2, 2.0)], [(1, 1.0), (1, 2.0), (1, 3.0)], [(1, 1), (2, 0), (3, 1)]])
def test_no_line_without_three_values(points: list[tuple[float, float]]) -> None:
    assert fit(points) is None
