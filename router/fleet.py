"""The attention workers of an engine: who is in use, who comes and who leaves, and which of them takes a sequence.

add ---> in use or looked for ---remove---> leaving: used only while there is nobody else
                                               |
                               its sequences have left, or are over ---> forgotten
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from grokmoe.errors import GrokmoeError, Reason, Unavailable
from router.cell import AttentionCell
from router.fault_counters import FaultCounters
from router.register import Register
from router.request import Request
from router.sequence import Sequence
from router.step_pace import Pace
from router.worker_state import WorkerState

logger = logging.getLogger(__name__)


class Fleet:
    """cells: all that are members, in the order in which they came."""

    def __init__(
        self,
        register: Register,
        counters: FaultCounters,
        max_migrations: int,
        failed: Callable[[Sequence, GrokmoeError], None],
        on_change: Callable[[], None],
    ) -> None:
        """max_migrations: see EngineSettings. failed: the request of a sequence ends with an error. on_change: called
        when a worker is in use, or is no longer."""
        self.cells: list[AttentionCell] = []
        self._register, self._counters, self._max_migrations = register, counters, max_migrations
        self._failed, self._on_change = failed, on_change
        self._leaving: dict[AttentionCell, asyncio.Task[None]] = {}
        self._news = asyncio.Event()

    def add(self, cell: AttentionCell) -> None:
        """A worker more."""
        self.cells.append(cell)

    def remove(self, cell: AttentionCell) -> asyncio.Task[None]:
        """Takes a worker out of use; the task ends when it is forgotten. See Engine.remove_cell."""
        if cell not in self._leaving:
            self._leaving[cell] = asyncio.create_task(self._retire(cell), name=f"retire cell {cell.index}")
        return self._leaving[cell]

    async def _retire(self, cell: AttentionCell) -> None:
        while cell.load:
            if self.others(cell):
                cell.retire()
            self._news.clear()
            await self._news.wait()
        self.cells.remove(cell)
        del self._leaving[cell]
        await cell.close()
        logger.info("%s has left", cell.name)
        self._on_change()

    def stop_leaving(self) -> None:
        """Nobody is waited for to leave any more: `close` ends them all."""
        for task in self._leaving.values():
            task.cancel()

    async def close(self) -> None:
        """Ends lanes and links."""
        for cell in self.cells:
            await cell.close()

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return sum(cell.scheduler.num_running for cell in self.cells if cell.info)

    @property
    def num_waiting(self) -> int:
        """Sequences without pages."""
        return sum(cell.scheduler.num_waiting for cell in self.cells if cell.info)

    @property
    def is_in_use(self) -> bool:
        """Whether any worker is."""
        return any(cell.state is WorkerState.READY for cell in self.cells)

    def others(self, cell: AttentionCell) -> list[AttentionCell]:
        """The workers in use beside this one that are here to stay."""
        return [other for other in self._usable() if other is not cell]

    def _usable(self) -> list[AttentionCell]:
        return [cell for cell in self.cells if cell.state is WorkerState.READY and cell not in self._leaving]

    def least_loaded(self, request: Request) -> AttentionCell:
        """The best place for one sequence more of a request.

        Raises Unavailable while no worker has ever been there, or none has the request's adapter.
        """
        joined = [cell for cell in self.cells if cell.info is not None]
        if not joined:
            raise Unavailable("no attention worker has joined yet", reason=Reason.WORKER_UNAVAILABLE)
        fitting = [cell for cell in joined if cell.can_compute(request)]
        ready = [cell for cell in fitting if cell.state is WorkerState.READY]
        staying = [cell for cell in fitting if cell not in self._leaving]
        # Who is about to leave is used only if there is nobody else, who is lost only to wait in.
        usable = [cell for cell in ready if cell in staying] or ready or staying or fitting
        if not usable:
            assert request.adapter is not None
            message = f"no attention worker has the adapter {request.adapter.name}"
            raise Unavailable(message, reason=Reason.WORKER_UNAVAILABLE)
        return min(usable, key=lambda cell: (_reluctance(cell), cell.load))

    def rehome(self, sequences: list[Sequence]) -> None:
        """Finds a cell for sequences that have left theirs, the same one if there is no better. Who has lost its worker
        too often ends."""
        failed: list[tuple[Sequence, GrokmoeError]] = []
        for sequence in sequences:
            if sequence.num_migrations > self._max_migrations:
                self._counters.migration_limits += 1
                times = f"its attention worker was lost {sequence.num_migrations} times while computing it"
                failed.append((sequence, Unavailable(times, reason=Reason.WORKER_UNAVAILABLE)))
                continue
            try:
                cell = self.least_loaded(sequence.request)
                cell.add(sequence)
            except GrokmoeError as refusal:  # a cell with fewer pages than the lost one, or none with its adapter
                failed.append((sequence, refusal))
            else:
                self._register.move(sequence, cell)
        # Only now: it cancels the other candidates of a request, which must be in a cell or over.
        for sequence, _ in failed:
            sequence.cancel()
        for sequence, error in failed:
            self._failed(sequence, error)
        self.wake()

    def cell_changed(self, cell: AttentionCell) -> None:
        """A worker is in use again, or no longer."""
        if cell.state is WorkerState.READY:
            for other in self.cells:
                if other is not cell:
                    self.rehome(other.take_stranded())
                    other.rearm()
        self.wake()
        self._on_change()

    def wake(self) -> None:
        """Something that a worker waits for before it leaves may have happened."""
        self._news.set()


def _reluctance(cell: AttentionCell) -> int:
    """How bad a place it is for one sequence more: 0, it has room, and is not slow, or on trial and idle; 1, it has
    room, and is on trial; 2, it is slow or full, and used only if nobody else has room."""
    pace = cell.pace.pace
    if not cell.room or pace is Pace.SLOW:
        return 2
    return int(pace is Pace.TRIAL and cell.load > 0)
