"""Charts as SVG text, drawn with a style sheet's colours so that they follow light and dark."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence

from loadtest.scale import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Scale, number

Points = Sequence[tuple[float, float]]

MOST_POINTS = 1500
"""Of a series; more cannot be told apart at this size."""


@dataclasses.dataclass(frozen=True)
class Series:
    """kind: `line`, `step` or `dots`. colour: number of a class of the style sheet."""

    name: str
    points: Points
    kind: str = "line"
    colour: int = 0
    is_dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Mark:
    """A vertical line, or with `end` a span, at a value of the x axis."""

    at: float
    text: str
    end: float | None = None


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series], marks: Sequence[Mark] = ()) -> str:
    """One chart with its legend. Empty if there is nothing to draw."""
    series = [dataclasses.replace(each, points=thin(each.points)) for each in series if len(each.points)]
    if not series:
        return ""
    x_scale = Scale(x, [point[0] for each in series for point in each.points], LEFT, WIDTH - RIGHT)
    y_scale = Scale(y, [point[1] for each in series for point in each.points], HEIGHT - BOTTOM, TOP)
    parts = [*_marks(marks, x_scale), *_axes(x, y, x_scale, y_scale)]
    parts += [_draw(each, x_scale, y_scale) for each in series]
    legend = "".join(
        f'<span class="key"><i class="k{each.colour}{_key_style(each)}"></i>{html.escape(each.name)}</span>'
        for each in series
        if each.name
    )
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}<p class=legend>{legend}</p></figure>"


def _key_style(series: Series) -> str:
    if series.kind == "dots":
        return " dots"
    return " dashed" if series.is_dashed else ""


def thin(points: Points) -> Points:
    """At most `MOST_POINTS`: of each run of neighbours the lowest and the highest, which are what one looks for."""
    if len(points) <= MOST_POINTS:
        return points
    size = -(-2 * len(points) // MOST_POINTS)
    kept = []
    for begin in range(0, len(points), size):
        run = points[begin : begin + size]
        ends = {min(range(len(run)), key=lambda i: run[i][1]), max(range(len(run)), key=lambda i: run[i][1])}
        kept += [run[index] for index in sorted(ends)]
    return kept


def _axes(x: Axis, y: Axis, x_scale: Scale, y_scale: Scale) -> list[str]:
    parts = []
    for tick in y_scale.ticks:
        at = y_scale(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_scale.ticks:
        at = x_scale(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(tick)}</text>'
        )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{html.escape(x.label)}</text>"
    )
    parts.append(
        f'<text class="label" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{html.escape(y.label)}</text>"
    )
    return parts


def _marks(marks: Sequence[Mark], x_scale: Scale) -> list[str]:
    parts = []
    for mark in marks:
        begin = x_scale(mark.at)
        if mark.end is not None:
            width = max(0.0, x_scale(mark.end) - begin)
            box = f'x="{begin:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - BOTTOM - TOP}"'
            parts.append(f'<rect class="span" {box}><title>{html.escape(mark.text)}</title></rect>')
        else:
            parts.append(f'<line class="mark" x1="{begin:.1f}" x2="{begin:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text class="marked" x="{begin + 4:.1f}" y="{TOP + 24}">{html.escape(mark.text)}</text>')
    return parts


def _draw(series: Series, x_scale: Scale, y_scale: Scale) -> str:
    places = [(x_scale(x), y_scale(y)) for x, y in series.points if x_scale.shows(x) and y_scale.shows(y)]
    if series.kind == "dots":
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
        return f'<path class="dots c{series.colour}" d="{dots}"/>'
    path = ""
    for index, (x, y) in enumerate(places):
        if not index:
            path = f"M{x:.1f} {y:.1f}"
        else:
            path += f"H{x:.1f}V{y:.1f}" if series.kind == "step" else f"L{x:.1f} {y:.1f}"
    circles = ""
    if series.kind == "line" and not series.is_dashed and len(places) <= 30:
        circles = "".join(
            f'<circle class="c{series.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{number(value[0])}: '
            f"{number(value[1])}</title></circle>"
            for (x, y), value in zip(places, series.points, strict=False)
        )
    dashed = " dashed" if series.is_dashed else ""
    return f'<path class="line c{series.colour}{dashed}" d="{path}"/>{circles}'
