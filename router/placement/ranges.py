"""Experts and their layers: as ranges, which is how they travel, and one by one, which is how they move."""

from __future__ import annotations

from collections.abc import Iterable

ExpertLayers = tuple[int, int, int]
"""(expert, first layer, one past the last layer)."""

Pair = tuple[int, int]
"""(layer, expert): the smallest thing that has a place."""


def pairs_of(ranges: Iterable[ExpertLayers]) -> set[Pair]:
    """One by one what the ranges name."""
    return {(layer, expert) for expert, begin, end in ranges for layer in range(begin, end)}


def ranges_of(pairs: Iterable[Pair]) -> tuple[ExpertLayers, ...]:
    """The fewest ranges that name exactly these, by expert and layer."""
    ranges: list[ExpertLayers] = []
    for expert, layer in sorted({(expert, layer) for layer, expert in pairs}):
        if ranges and ranges[-1][0] == expert and ranges[-1][2] == layer:
            ranges[-1] = (expert, ranges[-1][1], layer + 1)
        else:
            ranges.append((expert, layer, layer + 1))
    return tuple(ranges)
