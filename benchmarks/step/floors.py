"""The least time of each leg on this machine: its work at the machine's limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from benchmarks.limits import Limits
from benchmarks.step.work import StepShape, Work, work_of


def floor_seconds(work: Work, limits: Limits) -> float:
    """Reading and multiplying overlap at best, so the longer of the two; messages come on top."""
    read = limits.read_seconds(work.num_bytes, work.working_set)
    hops = work.num_hops * limits.hop_seconds(work.hop_bytes) if work.num_hops else 0.0
    return max(read, limits.multiply_seconds(work.flops)) + hops


def floors_of(steps: Iterable[StepShape], limits: Limits) -> dict[str, float]:
    """Seconds by leg, all these steps together."""
    floors: Counter[str] = Counter()
    for step in steps:
        for leg, work in work_of(step).items():
            floors[leg] += floor_seconds(work, limits)
    return dict(floors)
