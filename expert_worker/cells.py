"""Cells, (layer, unit): what an expert worker holds, loads and gives up one by one (`grokmoe.expert_units`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

Cell = tuple[int, int]
"""(layer, unit)."""

Cells = frozenset[Cell]


def cells_of(held: Mapping[int, Sequence[int]]) -> Cells:
    """layer -> units, as a set."""
    return frozenset((layer, unit) for layer, units in held.items() for unit in units)


def by_layer(cells: Iterable[Cell]) -> dict[int, tuple[int, ...]]:
    """layer -> units, both ascending; layers without any are left out."""
    found: defaultdict[int, list[int]] = defaultdict(list)
    for layer, unit in sorted(cells):
        found[layer].append(unit)
    return {layer: tuple(units) for layer, units in found.items()}
