"""A heat map as SVG text: rows over time, the darker the more."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from loadtest.scale import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Axis, Scale, number


def heat_map(
    title: str, edges: Sequence[float], rows: Mapping[str, Sequence[float]], x_label: str, y_label: str
) -> str:
    """A cell per row and span between two edges; the darker, the more. Empty if there is nothing to draw."""
    if len(edges) < 2 or not rows:
        return ""
    height = max(120, min(18, 320 // len(rows)) * len(rows) + TOP + BOTTOM)
    x_scale = Scale(Axis(x_label, is_tight=True, low=edges[0], high=edges[-1]), [], LEFT, WIDTH - RIGHT)
    most = max((value for values in rows.values() for value in values), default=0.0) or 1.0
    cell = (height - TOP - BOTTOM) / len(rows)
    parts = []
    for row, (name, values) in enumerate(rows.items()):
        y = TOP + row * cell
        if cell >= 9 or row % 8 == 0:
            middle = y + cell / 2 + 4
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{middle:.1f}" text-anchor="end">{name}</text>')
        for index, value in enumerate(values):
            begin, end = x_scale(edges[index]), x_scale(edges[index + 1])
            box = f'x="{begin:.1f}" y="{y:.1f}" width="{max(0.0, end - begin - 0.5):.1f}" height="{cell - 0.5:.1f}"'
            parts.append(
                f'<rect class="cell" {box} fill-opacity="{0.04 + 0.96 * value / most:.3f}">'
                f"<title>{html.escape(name)}: {number(value)}</title></rect>"
            )
    for tick in x_scale.ticks:
        parts.append(
            f'<text class="tick" x="{x_scale(tick):.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">'
            f"{number(tick)}</text>"
        )
    parts.append(
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 8}" text-anchor="middle">'
        f"{html.escape(x_label)}</text>"
    )
    middle = (TOP + height - BOTTOM) / 2
    parts.append(
        f'<text class="label" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{html.escape(y_label)}</text>"
    )
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    key = f'<p class=legend><span class="key">0 <i class="ramp"></i> {number(most)} rows/s</span></p>'
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}{key}</figure>"
