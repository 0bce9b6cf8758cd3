"""A simulated cell: a router's process and network, its attention workers, the expert workers that it reaches."""

from __future__ import annotations

from planner.simulated.attention_worker import SimulatedAttentionWorker
from planner.simulated.clock import Server
from planner.simulated.pool import Pool
from planner.simulated.surroundings import Surroundings
from router.sequence import Sequence


class SimulatedCell:
    """process, links: what does one thing after another; links out and in."""

    def __init__(self, around: Surroundings, num_workers: int, pool: Pool) -> None:
        self.pool, self.is_up = pool, True
        self.process = Server(around.clock)
        self.links = Server(around.clock), Server(around.clock)
        self.workers = [SimulatedAttentionWorker(around, self.process, self.links, pool) for _ in range(num_workers)]
        self._around = around
        self._broken: set[SimulatedAttentionWorker] = set()

    @property
    def load(self) -> float:
        """Sequences per attention worker that is there."""
        there = sum(worker.is_up for worker in self.workers)
        return sum(worker.load for worker in self.workers) / max(1, there)

    @property
    def is_usable(self) -> bool:
        """Whether a request would be served."""
        return self.is_up and any(worker.is_up for worker in self.workers)

    def add(self, sequence: Sequence) -> None:
        """To the least loaded attention worker; where none is there, it waits for one to come back."""
        there = [worker for worker in self.workers if worker.is_up] or self.workers
        min(there, key=lambda worker: worker.load).add(sequence)

    def lose_worker(self, worker: SimulatedAttentionWorker) -> None:
        """Its sequences go to the others, which compute them again."""
        self._broken.add(worker)
        for sequence in worker.fail():
            self._around.note_moved(sequence)
            self.add(sequence)

    def worker_is_back(self, worker: SimulatedAttentionWorker) -> None:
        """It is used, if there is a router to use it."""
        self._broken.discard(worker)
        if self.is_up:
            worker.come_back()

    def fail(self) -> list[Sequence]:
        """The router is gone: the sequences that it had, whose clients take them elsewhere."""
        self.is_up = False
        for server in (self.process, *self.links):
            server.forget()
        return [sequence for worker in self.workers for sequence in worker.fail()]

    def come_back(self) -> None:
        """With empty books; attention workers that were not lost themselves are there."""
        self.is_up = True
        for worker in self.workers:
            if worker not in self._broken:
                worker.come_back()
