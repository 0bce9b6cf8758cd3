"""One expert worker as the pool knows it: its link, what it said of itself, its state, its load."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable

from router.experts.latency import Latency
from router.placement import ExpertLayers, Pair, pairs_of, ranges_of
from router.probing import Prober
from router.transport.base import ExpertInfo, ExpertLink, ExpertReply
from router.worker_state import WorkerEvent, WorkerState, after

QUEUE_MEMORY = 0.25
"""Seconds for which the queue that a worker has reported counts as load; later it says nothing any more."""


MIN_QUEUE = 0.001
"""Seconds: a shorter wait in the worker is a hand-over between threads and no queue."""


class ExpertMember:
    """index: given once and never again, so that it names the worker for as long as the router lives.

    withdrawn: what it still describes and gets no rows for any more, because it is to give it up. missing: what it has
    refused rows for, until it is described again.
    rows_sent: per layer, since start. computed: rows and seconds of computation by class of rows, since start. In
    both a row for a slice counts as its part of one.
    """

    def __init__(self, index: int, link: ExpertLink, clock: Callable[[], float] = time.monotonic) -> None:
        self.index = index
        self.link = link
        self.info: ExpertInfo | None = None
        self.state = WorkerState.JOINING
        self.latency = Latency()
        self.rows_in_flight = 0
        self.prober: Prober | None = None
        self.is_removed = False
        self.withdrawn: set[Pair] = set()
        self.missing: set[Pair] = set()
        self.rows_sent: defaultdict[int, float] = defaultdict(float)
        self.computed: dict[int, tuple[float, float]] = {}
        self._calls: set[int] = set()
        self._num_calls = 0
        self._drains: list[tuple[set[int], asyncio.Future[None]]] = []
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
            self.computed.clear()
            self.withdrawn.clear()
        self.info = info
        self.missing.clear()
        self.withdrawn &= pairs_of(info.experts)
        self.note(WorkerEvent.ANSWERED)

    @property
    def held(self) -> tuple[ExpertLayers, ...]:
        """What it gets rows for while it is usable."""
        if self.info is None:
            return ()
        absent = self.withdrawn | self.missing
        return ranges_of(pairs_of(self.info.experts) - absent) if absent else self.info.experts

    @property
    def calls_in_flight(self) -> int:
        """Calls that have no answer yet."""
        return len(self._calls)

    @property
    def load(self) -> int:
        """Rows it has to compute before a new call: ours, and those before ours in its last answer."""
        is_fresh = self._clock() - self._reported_at < QUEUE_MEMORY
        return self.rows_in_flight + (self._queued_rows if is_fresh else 0)

    def begin(self, layer: int, num_rows: int, work: float) -> int:
        """A call goes out. work: see Shard. Returns its number."""
        self.rows_in_flight += num_rows
        self.rows_sent[layer] += work
        self._num_calls += 1
        self._calls.add(self._num_calls)
        return self._num_calls

    def end(self, call: int, num_rows: int) -> None:
        """A call is over, well or not."""
        self.rows_in_flight -= num_rows
        self._calls.remove(call)
        for calls, done in self._drains:
            calls.discard(call)
            if not calls and not done.done():
                done.set_result(None)

    async def drained(self) -> None:
        """Returns when the calls that are in flight now are over; later ones do not count."""
        if not self._calls:
            return
        drain = (set(self._calls), asyncio.get_running_loop().create_future())
        self._drains.append(drain)
        try:
            await drain[1]
        finally:
            self._drains.remove(drain)

    def report(self, num_rows: int, work: float, reply: ExpertReply) -> None:
        """Takes in the worker's own times: who waited for whole computations stood behind so many calls like itself.

        A wait that is shorter than one counts as none, or the noise of it would send all rows to one replica.
        """
        num_before = 0
        if reply.compute > 0 and reply.queue >= MIN_QUEUE:
            num_before = int(min(reply.queue / reply.compute, 100.0))
        self._queued_rows, self._reported_at = num_rows * num_before, self._clock()
        if reply.compute > 0:
            # Rows of others that were computed along have their part of the time.
            share = num_rows / max(reply.batch_rows, num_rows)
            rows, seconds = self.computed.get(num_rows.bit_length(), (0.0, 0.0))
            self.computed[num_rows.bit_length()] = rows + work, seconds + reply.compute * share
