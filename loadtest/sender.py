"""Sends a plan through the SDK, on schedule, whatever the server does, and stamps what comes back."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from grokmoe import AsyncClient, AsyncStream, Cancelled, GrokmoeError, InvalidRequest
from loadtest.job import Counts, Job
from loadtest.planned import PlannedRequest
from loadtest.record import Outcome, RequestRecord

ABORT_SECONDS = 5.0
"""How long streams that were cut off may take to end."""


class Sender:
    """Runs plans, one after the other. `counts` is how far the present one is."""

    def __init__(self, client: AsyncClient, job: Job, clock: Callable[[], float] = time.monotonic) -> None:
        self._client, self._job, self._clock = client, job, clock
        self._begin = 0.0
        self._live: set[asyncio.Task[None]] = set()
        self._bugs: list[BaseException] = []
        self.counts = Counts()

    async def run(self, plan: Sequence[PlannedRequest], begin: float) -> list[RequestRecord]:
        """Sends each request at its time after `begin`; returns when all have ended, or were cut off.

        Without a bound on what is under way a request is sent by the very turn of the loop that wakes for it. With one
        it waits for its turn in order, and its latency counts from when it was due.
        """
        self._begin, self.counts = begin, Counts()
        records = [RequestRecord(planned.index, planned.at) for planned in plan]
        turns = None if self._job.concurrency is None else asyncio.Semaphore(self._job.concurrency)
        for planned, record in zip(plan, records, strict=True):
            await asyncio.sleep(max(0.0, begin + planned.at - self._clock()))
            record.woken = self._now()
            self.counts.worst_lag = max(self.counts.worst_lag, record.lag)
            self._keep(self._open(planned, record) if turns is None else self._in_turn(planned, record, turns))
        await self._drain()
        if self._bugs:
            raise self._bugs[0]
        return records

    async def run_closed(self, plan: Sequence[PlannedRequest], begin: float) -> list[RequestRecord]:
        """As many clients as the job's bound take the plan's requests in turn; each is due when its client is free."""
        assert self._job.concurrency is not None, "a closed loop has a bound"
        self._begin, self.counts = begin, Counts()
        records: list[RequestRecord] = []
        waiting = iter(plan)

        async def client() -> None:
            for planned in waiting:
                record = RequestRecord(planned.index, self._now())
                record.woken = record.scheduled
                records.append(record)
                await self._open(planned, record)

        await asyncio.sleep(max(0.0, begin - self._clock()))
        for _ in range(min(self._job.concurrency, len(plan))):
            self._keep(client())
        if self._live:
            await asyncio.wait(self._live)
        if self._bugs:
            raise self._bugs[0]
        return records

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._live.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """What a server can cause is in the task's record; anything else would make the figures wrong in silence."""
        self._live.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._bugs.append(error)

    async def _drain(self) -> None:
        if not self._live:
            return
        await asyncio.wait(self._live, timeout=self._job.drain_seconds)
        for task in self._live:
            task.cancel()
        if self._live:
            await asyncio.wait(self._live, timeout=ABORT_SECONDS)

    async def _in_turn(self, planned: PlannedRequest, record: RequestRecord, turns: asyncio.Semaphore) -> None:
        async with turns:
            await self._open(planned, record)

    def _open(self, planned: PlannedRequest, record: RequestRecord) -> Coroutine[Any, Any, None]:
        """Begins the call at once; what is returned reads it to the end."""
        record.sent = record.end = self._now()
        self.counts.sent += 1
        name = f"{self._job.request_id_prefix}{planned.index}"
        options = {"max_tokens": planned.max_tokens, "request_id": name, **self._job.sampling}
        try:
            return self._read(self._client.stream(planned.prompt, **options), planned, record)
        except InvalidRequest as error:  # a prompt from a file can be what no message can carry
            self._fail(record, error)
            self.counts.ended += 1
            return asyncio.sleep(0)

    async def _read(self, stream: AsyncStream, planned: PlannedRequest, record: RequestRecord) -> None:
        digest = hashlib.blake2b(digest_size=8)
        num_tokens = 0
        try:
            async for delta in stream:
                now = self._now()
                if count := len(delta.token_ids):
                    record.arrivals.append(now)
                    record.counts.append(count)
                    digest.update(b"".join(token.to_bytes(4) for token in delta.token_ids))
                    num_tokens += count
                    self.counts.tokens += count
                if delta.finish_reason is not None:
                    record.end, record.outcome = now, Outcome.COMPLETED
                    record.input_len, record.cached_len = delta.usage.prompt_tokens, delta.usage.cached_tokens
                    record.server_queue = None if delta.timing is None else delta.timing.queue_seconds
                elif planned.leave_after is not None and num_tokens >= planned.leave_after:
                    record.outcome = Outcome.CANCELLED
                    break
        except GrokmoeError as error:
            self._fail(record, error)
        finally:
            await stream.aclose()
            if record.outcome is not Outcome.COMPLETED:
                record.end = self._now()
            record.digest = digest.hexdigest() if num_tokens else ""
            self.counts.ended += 1

    def _fail(self, record: RequestRecord, error: GrokmoeError) -> None:
        if record.outcome is Outcome.COMPLETED:
            return  # it had all it asked for
        if isinstance(error, Cancelled) and record.outcome is Outcome.CANCELLED:
            return
        record.outcome = Outcome.FAILED
        record.code, record.reason, record.message = error.code.name, str(error.reason), error.message
        self.counts.failed += 1

    def _now(self) -> float:
        return self._clock() - self._begin
