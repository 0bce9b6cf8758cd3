"""What is known about load, workers and costs when a plan is made.

Experts are numbers from 0 on here, layer by layer: whatever has a place of its own, a slice of an expert included.

Letters: L layers, E experts, W workers.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence

from router.rebalancing.layer import Layout, times

ROUNDING = 1e-9
"""Thirds of an expert do not add up to one."""


@dataclasses.dataclass(frozen=True)
class Situation:
    """Workers are numbers from 0 on.

    load_LE: rows per second, one for a slice as its part of a row. layouts: per layer who holds what. capacity_W: most
    whole experts of one layer on each worker; 0: not said. cost_W: what a row costs there, relative to the others.
    seconds_per_row: what it costs at 1.0. pair_bytes: what one expert of one layer takes. load_rate: bytes per second,
    loaded. size_LE: what each expert is of a whole one; empty: all are whole.
    """

    load_LE: Sequence[Sequence[float]]
    layouts: tuple[Layout, ...]
    capacity_W: tuple[int, ...]
    cost_W: tuple[float, ...]
    seconds_per_row: float
    pair_bytes: int
    load_rate: float
    size_LE: Sequence[Sequence[float]] = ()

    def sizes(self, layer: int) -> Sequence[float]:
        """Of the experts of a layer."""
        return self.size_LE[layer] if self.size_LE else [1.0] * len(self.load_LE[layer])

    def places(self) -> list[list[int]]:
        """Per layer and worker how many experts there may be: those that are there, and an even part of what is free,
        in which the largest of a layer has room.

        A worker that does not say how much it can hold is trusted with what it holds or with the mean of all, if that
        is more: nobody knows when its memory is full, and a spare one is there to be used.
        """
        places_LW = [[len(held) for held in layout] for layout in self.layouts]
        sizes_L = [self.sizes(layer) for layer in range(len(self.layouts))]
        totals = [
            sum(sizes[expert] for layout, sizes in zip(self.layouts, sizes_L, strict=True) for expert in layout[worker])
            for worker in range(len(self.capacity_W))
        ]
        mean = math.ceil(sum(totals) / len(totals) - ROUNDING)
        for worker, capacity in enumerate(self.capacity_W):
            free = (capacity or max(mean, totals[worker])) - totals[worker]
            emptiest = [(layer[worker], number) for number, layer in enumerate(places_LW)]
            heapq.heapify(emptiest)
            while free > 0 and emptiest:
                count, number = heapq.heappop(emptiest)
                if count < len(sizes_L[number]) and max(sizes_L[number]) <= free + ROUNDING:
                    places_LW[number][worker] = count + 1
                    heapq.heappush(emptiest, (count + 1, number))
                    free -= max(sizes_L[number])
        return places_LW

    def peak_seconds(self, layouts: Sequence[Layout]) -> float:
        """Seconds of expert computation per second, layer after layer that of its slowest worker."""
        return sum(map(max, self._times(layouts))) * self.seconds_per_row

    def imbalance(self, layouts: Sequence[Layout]) -> float:
        """That over what it would be if all workers had the same; 0 without any load."""
        return imbalance(self._times(layouts))

    def _times(self, layouts: Sequence[Layout]) -> list[list[float]]:
        return [times(layout, load_E, self.cost_W) for layout, load_E in zip(layouts, self.load_LE, strict=True)]


def imbalance(times_LW: Sequence[Sequence[float]]) -> float:
    """The busiest worker of every layer over the mean one, averaged over layers by their load: 1 is even, 0 nothing."""
    mean = sum(sum(layer) / len(layer) for layer in times_LW if layer)
    return sum(map(max, times_LW)) / mean if mean > 0 else 0.0
