"""How sequences leave a worker that lives: what this one has computed of them is computed again elsewhere.

    it drains     all, as soon as no step is in flight
    it is slow    as many as have room with better ones, between two steps; the same one only so often

Both count as moves, and nothing is held against the sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router.cell.neighbour import Neighbour
from router.fault_counters import FaultCounters
from router.scheduler import Scheduler
from router.sequence import Sequence as Sequence_


class Leaving:
    """One worker's way out."""

    def __init__(
        self,
        neighbours: Callable[[], Sequence[Neighbour]],
        rehome: Callable[[list[Sequence_]], None],
        counters: FaultCounters,
        max_moves: int,
    ) -> None:
        """rehome: takes those that have left. max_moves: times that a sequence leaves a worker for being slow."""
        self._neighbours, self._rehome, self._counters, self._max_moves = neighbours, rehome, counters, max_moves

    @property
    def room(self) -> int:
        """Room with all the others of which it is not known that they are slow."""
        return sum(other.room for other in self._neighbours() if not other.is_slow)

    def all_leave(self, scheduler: Scheduler) -> None:
        """Nothing is in flight."""
        leaving = scheduler.drain_all()
        self._counters.moves += len(leaving)
        self._rehome(leaving)

    def some_leave(self, scheduler: Scheduler) -> None:
        """As many as have room."""
        leaving = scheduler.give_up(self.room, lambda sequence: sequence.num_moves < self._max_moves)
        for sequence in leaving:
            sequence.num_moves += 1
        self._counters.moves += len(leaving)
        self._rehome(leaving)
