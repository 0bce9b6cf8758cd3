"""Where an attention worker's share of a step goes, stage by stage.

A lap costs a tenth of a microsecond, so the clock always runs. On a GPU a lap ends when the work has been handed to the
device, not when it is done.
"""

from __future__ import annotations

import time

from grokmoe.recording import current

STAGES = ("embed", "norm", "qkv", "attention", "out", "head", "sample")
"""embed: rows of the embedding, angles of the rotation. norm: all norms and additions to the residual. qkv: the three
projections, one product. attention: rotation, writing to pages, scores and values. out: one product. head: the product
with the vocabulary. sample: tokens are drawn, what was asked for of the logits is computed."""


def no_time() -> dict[str, int]:
    """Nanoseconds per stage of a step that has not begun."""
    return dict.fromkeys(STAGES, 0)


class StageClock:
    """A stopwatch with laps, for the one thread that computes. Steps take turns: each begins with its own sums."""

    __slots__ = ("_last", "_spent_ns")

    def __init__(self) -> None:
        self._spent_ns = no_time()
        self._last = time.perf_counter_ns()

    def begin(self, spent_ns: dict[str, int]) -> None:
        """Time runs for a step from now on, and is added to its sums."""
        self._spent_ns = spent_ns
        self._last = time.perf_counter_ns()

    def lap(self, stage: str) -> None:
        """What was computed since the last lap, or since `begin`, was this stage. So it is of what is recorded."""
        if (recording := current()) is not None:
            recording.lap(stage)
            return
        now = time.perf_counter_ns()
        self._spent_ns[stage] += now - self._last
        self._last = now
