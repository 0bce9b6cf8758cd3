"""Cells, (layer, expert): the unit in which experts are held, loaded and given up. Sets, ranges and words of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

Cell = tuple[int, int]
"""(layer, expert)."""

Cells = frozenset[Cell]


def cells_of(held: Mapping[int, Sequence[int]]) -> Cells:
    """layer -> experts, as a set."""
    return frozenset((layer, expert) for layer, experts in held.items() for expert in experts)


def by_layer(cells: Iterable[Cell]) -> dict[int, tuple[int, ...]]:
    """layer -> experts, both ascending; layers without any are left out."""
    found: defaultdict[int, list[int]] = defaultdict(list)
    for layer, expert in sorted(cells):
        found[layer].append(expert)
    return {layer: tuple(experts) for layer, experts in found.items()}


def ranges(cells: Iterable[Cell]) -> list[tuple[int, int, int]]:
    """(expert, first layer, one past the last layer), ascending."""
    found: list[tuple[int, int, int]] = []
    for expert, layer in sorted((expert, layer) for layer, expert in cells):
        if found and found[-1][0] == expert and found[-1][2] == layer:
            found[-1] = (expert, found[-1][1], layer + 1)
        else:
            found.append((expert, layer, layer + 1))
    return found


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers for a reader, and for `parse_experts`: 0-3,7."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in found)


def spec(cells: Iterable[Cell]) -> str:
    """The specification (`expert_worker.config.parse_experts`) that means these cells: 0-3@0-31+4@32-63, or none."""
    layers_of = sorted((experts, layer) for layer, experts in by_layer(cells).items())
    groups = [
        (spans(experts), spans([layer for _, layer in group]))
        for experts, group in groupby(layers_of, key=lambda each: each[0])
    ]
    return "+".join(f"{experts}@{layers}" for experts, layers in groups) or "none"
