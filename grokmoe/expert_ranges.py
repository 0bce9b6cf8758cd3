"""Units and their layers: as ranges, which is how they travel, and one by one, which is how they are held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fractions import Fraction

from grokmoe.expert_units import num_slices_of

ExpertLayers = tuple[int, int, int]
"""(unit, first layer, one past the last layer); see `grokmoe.expert_units`."""

Pair = tuple[int, int]
"""(layer, unit): the smallest thing that has a place."""


def pairs_of(ranges: Iterable[ExpertLayers]) -> set[Pair]:
    """One by one what the ranges name."""
    return {(layer, unit) for unit, begin, end in ranges for layer in range(begin, end)}


def ranges_of(pairs: Iterable[Pair]) -> tuple[ExpertLayers, ...]:
    """The fewest ranges that name exactly these, by unit and layer."""
    ranges: list[ExpertLayers] = []
    for unit, layer in sorted({(unit, layer) for layer, unit in pairs}):
        if ranges and ranges[-1][0] == unit and ranges[-1][2] == layer:
            ranges[-1] = (unit, ranges[-1][1], layer + 1)
        else:
            ranges.append((unit, layer, layer + 1))
    return tuple(ranges)


def size_of(pairs: Iterable[Pair]) -> Fraction:
    """How many whole experts of one layer these are: a slice counts as its part of one."""
    numbers = Counter(num_slices_of(unit) for _, unit in pairs)
    return sum((Fraction(number, count) for count, number in numbers.items()), Fraction(0))
