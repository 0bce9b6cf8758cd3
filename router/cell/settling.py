"""What follows from how a step has ended, for the requests that took part in it. What follows for the worker, and where
sequences are computed next, is the cell's business.
"""

from __future__ import annotations

from collections.abc import Iterable

from grokmoe.errors import GrokmoeError
from grokmoe.step_plan import StepPlan
from router.cell.delivery import deliver
from router.cell.faulty_chunks import blame_for
from router.cell.flights import Flights, is_unwanted
from router.cell.hooks import CellHooks
from router.cell.outcome import Fate, Outcome
from router.fault_counters import FaultCounters
from router.scheduler import Scheduler
from router.sequence import Sequence
from router.step import Step


class Settling:
    """One cell's."""

    def __init__(self, flights: Flights, hooks: CellHooks, counters: FaultCounters, worker: str) -> None:
        """worker: its name, for errors."""
        self._flights, self._hooks, self._counters, self._worker = flights, hooks, counters, worker

    def settle(self, scheduler: Scheduler, step: Step, plan: StepPlan, outcome: Outcome) -> bool:
        """Hands out results, ends requests that cannot be computed. scheduler: the one that has made the step.

        Returns whether the worker may have computed something that is not finite. A step that was REFUSED or LOST is
        left in flight.
        """
        if outcome.fate is Fate.DONE:
            assert outcome.result is not None
            deliver(self._hooks, scheduler, step, plan, outcome.result)
        elif outcome.fate is Fate.FAULTY:
            return self._take_faulty(scheduler, step, plan, outcome)
        elif outcome.fate is Fate.CUT_OFF:
            nobody_waits = is_unwanted(step)
            self._counters.abandoned_steps += scheduler.fail(step) and nobody_waits
        elif outcome.fate in (Fate.HOMELESS, Fate.BUG) and scheduler.fail(step):
            assert outcome.error is not None
            self._end_requests(step, outcome.error)
        return False

    def _take_faulty(self, scheduler: Scheduler, step: Step, plan: StepPlan, outcome: Outcome) -> bool:
        """Some chunks are not finite. The others are used; pages that these have filled must not become known."""
        self._flights.end(step)
        if not scheduler.is_in_flight(step):
            return False
        assert outcome.result is not None
        deliver(self._hooks, scheduler, step, plan, outcome.result, outcome.faulty)
        self._counters.faulty_chunks += len(outcome.faulty)
        blame = blame_for(step, outcome.faulty, outcome.by_experts, self._worker)
        for sequence, error in blame.ending:
            self._hooks.failed(sequence, error)
        return blame.is_workers

    def give_up(self, scheduler: Scheduler, step: Step | None, error: GrokmoeError) -> None:
        """After a bug: ends the requests of a step that nobody drives any more, once. Raises what says that the books
        cannot be trusted; so does the want of a step, for then it was the scheduler that had the bug."""
        if step is None:
            raise AssertionError("no step could be scheduled")
        if self._flights.end(step):
            scheduler.fail(step)
            self._end_requests(step, error)
        scheduler.check()

    def end_all(self, sequences: Iterable[Sequence], error: GrokmoeError) -> None:
        """Ends the requests of all these sequences, which no scheduler knows any more."""
        for sequence in sequences:
            if not sequence.is_over:
                sequence.cancel()
            self._hooks.failed(sequence, error)

    def _end_requests(self, step: Step, error: GrokmoeError) -> None:
        for chunk in step.chunks:
            self._hooks.failed(chunk.sequence, error)
