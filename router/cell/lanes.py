"""The lanes of one worker: a task for each, that takes step after step.

      OPEN <---open / stop---> STOPPED     no further step begins; those in flight go on

Within OPEN a lane that finds nothing to do sleeps until `wake`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from router.step import Step


class Lanes:
    """Stopped at first."""

    def __init__(
        self,
        schedule: Callable[[], Step | None],
        run: Callable[[int, Step], Awaitable[None]],
        recover: Callable[[Step | None, Exception], None],
        restart_pause: float,
    ) -> None:
        """schedule: the next step. run: runs it to its end, on a lane. recover: after a bug in one of the two (no step:
        in the first); then the lane goes on, after `restart_pause` seconds."""
        self._schedule, self._run, self._recover, self._restart_pause = schedule, run, recover, restart_pause
        self._work = asyncio.Event()
        self._ready = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_open(self) -> bool:
        """Whether steps begin."""
        return self._ready.is_set()

    def start(self, num_lanes: int, name: str) -> None:
        """Starts the tasks."""
        self._tasks = [asyncio.create_task(self._go(lane), name=f"{name}-lane-{lane}") for lane in range(num_lanes)]

    def open(self) -> None:
        """Steps may begin."""
        self._ready.set()
        self._work.set()

    def stop(self) -> None:
        """No further step begins."""
        self._ready.clear()

    def wake(self) -> None:
        """There may be something to do."""
        self._work.set()

    async def close(self) -> None:
        """Ends the tasks, whatever they do."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _go(self, lane: int) -> None:
        while True:
            await self._ready.wait()
            step = None
            try:
                step = self._schedule()
                if step is not None:
                    await self._run(lane, step)
            except Exception as error:
                self._recover(step, error)
                await asyncio.sleep(self._restart_pause)
                continue
            if step is None:
                self._work.clear()
                await self._work.wait()
            else:
                self._work.set()
