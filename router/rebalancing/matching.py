"""The packed sets of a layer to its workers, so that as little as possible is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from router.rebalancing.layer import Layout, copies_of, peak

NEVER = 1e6
"""Cost of a set that a worker cannot take: more than all loads of a layer together."""


def match(
    present: Layout, packed: Layout, load_E: Sequence[float], places_W: Sequence[int], cost_W: Sequence[float]
) -> Layout:
    """Gives the sets of `packed` to workers so that fewest experts are loaded and the layer takes no longer."""
    top = peak(packed, load_E, cost_W) * (1 + 1e-9)
    copies = copies_of(packed, len(load_E))
    rows = [sum(load_E[expert] / copies[expert] for expert in held) for held in packed]
    costs = [
        [
            float(len(wanted - mine)) if len(wanted) <= room and rows[index] * cost <= top else NEVER
            for index, wanted in enumerate(packed)
        ]
        for mine, room, cost in zip(present, places_W, cost_W, strict=True)
    ]
    return tuple(packed[index] for index in assign(costs))


def assign(costs: Sequence[Sequence[float]]) -> list[int]:
    """One column for every row, each used once, at the least sum: the Hungarian method with potentials.

    Rows come in one after the other; each finds the cheapest chain of columns whose owners give way to one another.
    O(n^3).
    """
    size = len(costs)
    row_price, column_price = [0.0] * size, [0.0] * size
    owner = [-1] * size  # row of each column
    for new in range(size):
        distance = [float("inf")] * size
        through = [-1] * size  # the column before in the chain; -1: the new row itself
        done = [False] * size
        row, last, reached = new, -1, 0.0
        while True:
            for column in range(size):
                if not done[column]:
                    way = reached + costs[row][column] - row_price[row] - column_price[column]
                    if way < distance[column]:
                        distance[column], through[column] = way, last
            last = min((column for column in range(size) if not done[column]), key=distance.__getitem__)
            reached, done[last] = distance[last], True
            if owner[last] == -1:
                break
            row = owner[last]
        row_price[new] += reached
        for column in range(size):
            if done[column] and column != last:
                column_price[column] -= reached - distance[column]
                row_price[owner[column]] += reached - distance[column]
        while last != -1:
            before = through[last]
            owner[last] = new if before == -1 else owner[before]
            last = before
    columns = [0] * size
    for column, row in enumerate(owner):
        columns[row] = column
    return columns
