"""A simulated expert worker: calls wait their turn, those of one layer are computed together."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable

from planner.experts_time import ExpertWork
from planner.simulated.clock import Clock
from router.dispatch import Shard

MAX_ROWS = 8192
"""That a worker takes together."""


@dataclasses.dataclass(eq=False)
class ExpertCall:
    """Rows of one step and layer for one worker. answered, lost: what becomes of it."""

    layer: int
    shard: Shard
    answered: Callable[[ExpertCall], None]
    lost: Callable[[ExpertCall], None]

    @property
    def num_rows(self) -> int:
        """Rows of all its experts."""
        return self.shard.end - self.shard.begin


class SimulatedExpertWorker:
    """index: in the cluster. busy: seconds that it computed."""

    def __init__(self, clock: Clock, index: int, work: ExpertWork, per_call: float, load: dict[int, int]) -> None:
        """per_call: seconds of a computation beside its experts. load: by worker that is known to be there, the rows
        that it has still to compute; this one keeps its own."""
        self.index, self.busy, self.is_up = index, 0.0, True
        self._load = load
        load[index] = 0
        self._clock, self._work, self._per_call = clock, work, per_call
        self._waiting: list[ExpertCall] = []
        self._computing: list[ExpertCall] = []
        self._life = 0  # what was begun in an earlier one ends nowhere

    def take(self, call: ExpertCall) -> None:
        """A call has arrived. Where nobody is, it is lost."""
        if not self.is_up:
            call.lost(call)
            return
        self._waiting.append(call)
        self._load[self.index] += call.num_rows
        if not self._computing:
            self._begin()

    def fail(self, noticed_after: float) -> None:
        """It is gone; so is all that it was asked for, which those who asked learn so much later."""
        lost = self._computing + self._waiting
        self.is_up, self._computing, self._waiting = False, [], []
        self._life += 1
        for call in lost:
            self._clock.after(noticed_after, lambda call=call: call.lost(call))  # type: ignore[misc]

    def come_back(self) -> None:
        """With all that it held."""
        self.is_up = True
        self._load[self.index] = 0

    def _begin(self) -> None:
        layer, rows = self._waiting[0].layer, 0
        joined: list[ExpertCall] = []
        left: list[ExpertCall] = []
        for call in self._waiting:
            if call.layer == layer and (not joined or rows + call.num_rows <= MAX_ROWS):
                joined.append(call)
                rows += call.num_rows
            else:
                left.append(call)
        self._computing, self._waiting = joined, left
        seconds = self._seconds(joined)
        self.busy += seconds
        life = self._life
        self._clock.after(seconds, lambda: self._end(life))

    def _seconds(self, calls: list[ExpertCall]) -> float:
        counts: Iterable[int] = calls[0].shard.counts
        if len(calls) > 1:
            rows: Counter[int] = Counter()
            for call in calls:
                rows.update(dict(zip(call.shard.expert_ids, call.shard.counts, strict=True)))
            counts = rows.values()
        return self._per_call + sum(map(self._work.seconds_of, counts))

    def _end(self, life: int) -> None:
        if life != self._life:
            return
        done, self._computing = self._computing, []
        self._load[self.index] -= sum(call.num_rows for call in done)
        for call in done:
            call.answered(call)
        if self._waiting and not self._computing:
            self._begin()
