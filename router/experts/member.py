"""One expert worker as the pool knows it: its link, what it said of itself, its state, its load."""

from __future__ import annotations

import time
from collections.abc import Callable

from router.experts.latency import Latency
from router.probing import Prober
from router.transport.base import ExpertInfo, ExpertLink, ExpertReply
from router.worker_state import WorkerEvent, WorkerState, after

QUEUE_MEMORY = 0.25
"""Seconds for which the queue that a worker has reported counts as load; later it says nothing any more."""


MIN_QUEUE = 0.001
"""Seconds: a shorter wait in the worker is a hand-over between threads and no queue."""


class ExpertMember:
    """index: given once and never again, so that it names the worker for as long as the router lives."""

    def __init__(self, index: int, link: ExpertLink, clock: Callable[[], float] = time.monotonic) -> None:
        self.index = index
        self.link = link
        self.info: ExpertInfo | None = None
        self.state = WorkerState.JOINING
        self.latency = Latency()
        self.rows_in_flight = 0
        self.calls_in_flight = 0
        self.prober: Prober | None = None
        self.is_removed = False
        self._clock = clock
        self._queued_rows, self._reported_at = 0, -QUEUE_MEMORY

    @property
    def name(self) -> str:
        """For logs and errors."""
        return f"expert worker {self.index} at {self.link.address}"

    @property
    def is_usable(self) -> bool:
        """Whether it gets new work."""
        return self.state is WorkerState.READY and not self.is_removed

    def note(self, event: WorkerEvent) -> None:
        """Something has happened to it."""
        self.state = after(self.state, event)

    def adopt(self, info: ExpertInfo) -> None:
        """It has described itself and fits. What was learnt of another process at the same address is forgotten."""
        if self.info is None or self.info.incarnation != info.incarnation:
            self.latency = Latency()
        self.info = info
        self.note(WorkerEvent.ANSWERED)

    @property
    def load(self) -> int:
        """Rows it has to compute before a new call: ours, and those before ours in its last answer."""
        is_fresh = self._clock() - self._reported_at < QUEUE_MEMORY
        return self.rows_in_flight + (self._queued_rows if is_fresh else 0)

    def begin(self, num_rows: int) -> None:
        """A call goes out."""
        self.rows_in_flight += num_rows
        self.calls_in_flight += 1

    def end(self, num_rows: int) -> None:
        """A call is over, well or not."""
        self.rows_in_flight -= num_rows
        self.calls_in_flight -= 1

    def report(self, num_rows: int, reply: ExpertReply) -> None:
        """Takes in the worker's own times: who waited for whole computations stood behind so many calls like itself.

        A wait that is shorter than one counts as none, or the noise of it would send all rows to one replica.
        """
        num_before = 0
        if reply.compute > 0 and reply.queue >= MIN_QUEUE:
            num_before = int(min(reply.queue / reply.compute, 100.0))
        self._queued_rows, self._reported_at = num_rows * num_before, self._clock()
