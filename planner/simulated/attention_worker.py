"""A simulated attention worker, with the router's own scheduler and ledger for it."""

from __future__ import annotations

from collections.abc import Callable

from planner.shape import of_chunks
from planner.simulated.clock import Server
from planner.simulated.flight import Flight
from planner.simulated.pool import Pool
from planner.simulated.surroundings import Surroundings
from router.pages import PageLedger
from router.scheduler import Scheduler
from router.sequence import Sequence
from router.step import Step

TOKEN = 1
"""That is drawn: which one it is changes nothing."""


class SimulatedAttentionWorker:
    """num_steps, num_rows: that have landed. num_retries: expert calls that were sent again."""

    def __init__(self, around: Surroundings, process: Server, links: tuple[Server, Server], pool: Pool) -> None:
        """process, links, pool: of its router."""
        self.is_up = True
        self.device = Server(around.clock)
        self.num_steps = self.num_rows = self.num_retries = 0
        self._around, self._process, self._links, self._pool = around, process, links, pool
        self._flights: dict[Step, Flight] = {}
        self.scheduler = self._new_scheduler()

    def _new_scheduler(self) -> Scheduler:
        around = self._around
        return Scheduler(around.scheduler_settings, PageLedger(around.num_pages, around.page_size))

    @property
    def load(self) -> int:
        """Sequences here, running and waiting."""
        return self.scheduler.num_running + self.scheduler.num_waiting

    def add(self, sequence: Sequence) -> None:
        """A sequence more. Where nobody is, it waits."""
        self.scheduler.add(sequence)
        self._pump()

    def _pump(self) -> None:
        """Begins as many steps as the scheduler gives out."""
        while self.is_up and (step := self.scheduler.schedule()) is not None:
            shape = of_chunks((chunk.start, chunk.end, chunk.wants_token) for chunk in step.chunks)
            flight = Flight(
                self._around.clock,
                self._around.costs_of(shape),
                self.device,
                self._process,
                self._links,
                self._pool,
                self._around.routing,
                self._landing(step, shape.rows),
            )
            self._flights[step] = flight
            flight.begin()

    def _landing(self, step: Step, rows: int) -> Callable[[], None]:
        def landed() -> None:
            self.num_retries += self._flights.pop(step).num_retries
            self.num_steps += 1
            self.num_rows += rows
            tokens = [TOKEN] * sum(chunk.wants_token for chunk in step.chunks)
            for drawn in self.scheduler.complete(step, tokens):
                self._around.note(drawn)
            self._pump()

        return landed

    def fail(self) -> list[Sequence]:
        """It is gone, and its pages with it: the sequences it had, for others."""
        self.is_up = False
        for flight in self._flights.values():
            flight.cut()
            self.num_retries += flight.num_retries
        self._flights.clear()
        self.device.forget()
        return self.scheduler.drain_all()

    def come_back(self) -> None:
        """With empty pages; what waited here goes on."""
        waiting = self.scheduler.drain_all()
        self.scheduler, self.is_up = self._new_scheduler(), True
        for sequence in waiting:
            self.scheduler.add(sequence)
        self._pump()
