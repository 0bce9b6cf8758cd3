"""The load processes of a test: started, told what to send, and listened to."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from grokmoe.errors import InternalError, Unavailable
from grokmoe.settings import child_environment
from loadtest import frames
from loadtest.job import Counts, Go, Job
from loadtest.load_process import READY
from loadtest.planned import PlannedRequest, split
from loadtest.record import RequestRecord

HEAD_START = 0.3
"""Seconds from telling the processes to the start of the run, for the plans to reach all of them."""

SECONDS_PER_REQUEST = 50e-6
"""And so much more for each request, for large plans to be read."""

END_SECONDS = 10.0
"""A process that does not end by then is killed."""

_ROOT = str(Path(__file__).resolve().parent.parent)

Show = Callable[[Counts], None]
Begun = Callable[[float], None]


class Crew:
    """`num` processes that share every plan. Use as an async context manager: leaving it ends them."""

    def __init__(self, job: Job, num: int) -> None:
        if job.concurrency is not None:
            num = min(num, job.concurrency)
        bounds = [None] * num if job.concurrency is None else _shares(job.concurrency, num)
        self._jobs = [dataclasses.replace(job, concurrency=bound) for bound in bounds]
        self._processes: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Self:
        try:
            for job in self._jobs:
                process = await self._start()
                self._processes.append(process)
                await _tell(process, job)
            for process in self._processes:
                word = await self._hear(process)
                if word != READY:
                    raise InternalError(f"a load process said {word!r}")
        except BaseException:
            await self._stop()
            raise
        return self

    async def _start(self) -> asyncio.subprocess.Process:
        # The packages may be a checkout that was never installed; a child must find them where we did.
        path = os.pathsep.join(part for part in (_ROOT, child_environment().get("PYTHONPATH", "")) if part)
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "loadtest.load_process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=child_environment(PYTHONPATH=path),
            start_new_session=True,  # Ctrl-C is for us, who end it in order
        )

    async def run(
        self,
        plan: Sequence[PlannedRequest],
        is_closed: bool = False,
        show: Show = lambda counts: None,
        begun: Begun = lambda begin: None,
    ) -> list[RequestRecord]:
        """Sends the plan. Returns the records in its order. Raises Unavailable: a load process ended.

        is_closed: see `Go`. show: hears how far it is. begun: hears when it will begin, on the monotonic clock.
        """
        begin = time.monotonic() + HEAD_START + SECONDS_PER_REQUEST * len(plan)
        begun(begin)
        for process, part in zip(self._processes, split(plan, len(self._processes)), strict=True):
            await _tell(process, Go(begin, tuple(part), is_closed))
        counts = [Counts() for _ in self._processes]

        async def listen(which: int) -> list[RequestRecord]:
            while isinstance(word := await self._hear(self._processes[which]), Counts):
                counts[which] = word
                show(sum(counts, Counts()))
            records: list[RequestRecord] = word
            return records

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(listen(which)) for which in range(len(self._processes))]
        records = [record for task in tasks for record in task.result()]
        return sorted(records, key=lambda record: record.index)

    async def _hear(self, process: asyncio.subprocess.Process) -> Any:
        assert process.stdout is not None
        try:
            return await frames.read(process.stdout)
        except asyncio.IncompleteReadError:
            raise Unavailable(f"a load process ended with code {await process.wait()}") from None

    async def _stop(self) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                await asyncio.wait_for(process.wait(), END_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()


async def _tell(process: asyncio.subprocess.Process, value: Any) -> None:
    assert process.stdin is not None
    # Who is gone is noticed by who listens to it.
    with contextlib.suppress(ConnectionError):
        process.stdin.write(frames.encode(value))
        await process.stdin.drain()


def _shares(total: int, num: int) -> list[int | None]:
    """As even as whole numbers allow."""
    return [total // num + (which < total % num) for which in range(num)]
