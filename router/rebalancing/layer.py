"""The experts of one layer on workers, and how long the layer takes.

Letters: E experts, W workers.
"""

from __future__ import annotations

from collections.abc import Sequence

Layout = tuple[frozenset[int], ...]
"""Per worker the experts that it holds in a layer."""


def copies_of(layout: Sequence[frozenset[int] | set[int]], num_experts: int) -> list[int]:
    """How many workers hold each expert."""
    copies = [0] * num_experts
    for held in layout:
        for expert in held:
            copies[expert] += 1
    return copies


def times(layout: Sequence[frozenset[int] | set[int]], load_E: Sequence[float], cost_W: Sequence[float]) -> list[float]:
    """Per worker the rows per second that it gets, each replica an equal part, times what a row costs there."""
    copies = copies_of(layout, len(load_E))
    return [
        sum(load_E[expert] / copies[expert] for expert in held) * cost
        for held, cost in zip(layout, cost_W, strict=True)
    ]


def peak(layout: Sequence[frozenset[int] | set[int]], load_E: Sequence[float], cost_W: Sequence[float]) -> float:
    """The time of the layer: that of its slowest worker."""
    return max(times(layout, load_E, cost_W), default=0.0)


def size_of_loads(present: Layout, wanted: Layout, size_E: Sequence[float]) -> float:
    """What has to be loaded to get from one to the other, in whole experts."""
    return sum(size_E[expert] for old, new in zip(present, wanted, strict=True) for expert in new - old)
