"""One attention worker as the router drives it: its scheduler, its lanes, its loss and return.

What happens to its sequences, whatever happens to it:

    lost      those in a step count a migration; all are recomputed elsewhere, or here when it is back
    drains    steps in flight end first, then all are recomputed elsewhere; nothing is counted
    hangs     the same as lost, if there is an elsewhere; else it is waited for
    is slow   as many as have room elsewhere are recomputed there; nothing is counted
    a bug     the requests of the step end with INTERNAL, the lane goes on
    NaN       the sequence is recomputed once, elsewhere if it can be; after that its request ends with INTERNAL, and at
              once if it was the experts that had no finite answer; the others of the step go on
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time

import torch

from grokmoe.errors import GrokmoeError, Unavailable
from grokmoe.logs import about
from grokmoe.model_config import ModelConfig
from router.attention_member import AttentionMember, CellSettings
from router.cell.flights import Flights
from router.cell.hooks import CellHooks
from router.cell.lanes import Lanes
from router.cell.leaving import Leaving
from router.cell.loss import Loss, is_alive
from router.cell.outcome import Fate, bug_in_step, outcome_of
from router.cell.settling import Settling
from router.cell.tempo import Tempo
from router.fault_counters import FaultCounters
from router.legs import Legs
from router.pages import PageLedger
from router.plan_writer import write_plan
from router.request import Request
from router.scheduler import Scheduler
from router.sequence import Sequence
from router.step import SchedulerSettings, Step
from router.step_pace import StepPace
from router.step_times import StepTimes
from router.transport.base import AttentionInfo, AttentionLink
from router.worker_state import WorkerEvent, WorkerState

logger = logging.getLogger(__name__)


class AttentionCell(AttentionMember):
    """The scheduler of one worker and a task per lane. A lane is: schedule, run, complete."""

    def __init__(
        self,
        index: int,
        link: AttentionLink,
        config: ModelConfig,
        dtype: torch.dtype,
        settings: SchedulerSettings,
        hooks: CellHooks,
        care: CellSettings | None = None,
        counters: FaultCounters | None = None,
    ) -> None:
        super().__init__(index, link, config, dtype, care or CellSettings())
        self.counters = counters or FaultCounters()
        self.scheduler: Scheduler
        self._settings, self._hooks = settings, hooks
        self._tempo = Tempo(self.care.deadline, self.care.pace, hooks.others)
        self._flights = Flights(self._tempo, self._became_slow)
        self._settling = Settling(self._flights, hooks, self.counters, self.name)
        self._leaving = Leaving(hooks.others, hooks.rehome, self.counters, self.care.max_moves)
        self._lanes = Lanes(self._next_step, self._run_step, self._recover, self.care.restart_pause)
        self._schedule_seconds = 0.0
        self._is_lost = True
        self._loss = Loss()
        self._inquest: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the lanes."""
        self._lanes.start(self._settings.num_lanes, f"cell-{self.index}")

    def check(self, request: Request) -> None:
        """Raises InvalidRequest when the request could never be served here."""
        self.scheduler.check_fits(request)

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence. Raises InvalidRequest when it could never be served here."""
        self.scheduler.add(sequence)
        self._lanes.wake()

    def cancel(self, sequence: Sequence) -> None:
        """Forgets a sequence. A step that nobody else takes part in is abandoned, whatever it waits for."""
        self.scheduler.cancel(sequence)
        if sequence.in_flight:
            self._flights.abandon_unwanted()
        self._lanes.wake()

    @property
    def load(self) -> int:
        """Sequences here, running and waiting."""
        return 0 if self.info is None else self.scheduler.num_running + self.scheduler.num_waiting

    @property
    def room(self) -> int:
        """Sequences more that would take part in its steps at once."""
        return 0 if self.info is None else self.scheduler.room

    @property
    def times(self) -> StepTimes:
        """What its answers took."""
        return self._tempo.times

    @property
    def pace(self) -> StepPace:
        """Whether it is slow beside the others."""
        return self._tempo.pace

    @property
    def is_slow(self) -> bool:
        """Whether it is to be avoided where there is a better one."""
        return self._tempo.is_slow

    def drain(self) -> None:
        """The worker is about to end: no further step begins, and when those in flight have ended, the sequences leave
        for another one or wait for its return."""
        if self._stop_lanes(WorkerEvent.DRAINS):
            logger.info("%s is about to end", self.name)
            self.seek()
            self._hand_over()

    def retire(self) -> None:
        """The same for good: the worker is not looked for any more."""
        self._prober.stop()
        if self._stop_lanes(WorkerEvent.DRAINS):
            self._hand_over()

    def _stop_lanes(self, event: WorkerEvent) -> bool:
        """No further step begins. False if none would have."""
        if self.state is not WorkerState.READY:
            return False
        self._lanes.stop()
        self._enter(event)
        self._hooks.changed()
        return True

    def rearm(self) -> None:
        """Another worker is in use now: one that is slow to answer need not be waited for any more."""
        self._flights.rearm()

    def take_stranded(self) -> list[Sequence]:
        """The sequences that wait here for a worker that is not in use; they are no longer here then."""
        if self.info is None or self.state is WorkerState.READY or self.scheduler.num_in_flight:
            return []
        return self.scheduler.drain_all()

    async def close(self) -> None:
        """Ends the lanes and the link."""
        if self._inquest is not None:
            self._inquest.cancel()
            await asyncio.gather(self._inquest, return_exceptions=True)
        await self._lanes.close()
        await self.leave()

    def check_books(self) -> None:
        """Asserts what must always hold."""
        if self.info is None:
            return
        self.scheduler.check()
        assert self.scheduler.num_in_flight <= len(self._flights), "a step in flight that nobody watches"
        assert self.state is WorkerState.READY or not self._lanes.is_open, "lanes run without a worker"

    def _next_step(self) -> Step | None:
        begin = time.perf_counter()
        step = self.scheduler.schedule()
        self._schedule_seconds = time.perf_counter() - begin  # a lane runs a step as soon as it has it
        return step

    async def _run_step(self, lane: int, step: Step) -> None:
        scheduler, info, legs = self.scheduler, self.info, Legs()
        assert info is not None
        legs.add("schedule", self._schedule_seconds)
        watch = self._flights.begin(step)
        with legs.time("plan"):
            self._hooks.note_scheduled(step)
            plan = write_plan(step, info.incarnation, self._hooks.step_begins(step))
        begin = time.perf_counter()
        outcome = await outcome_of(
            step,
            self._config.vocab_size,
            lambda: self._hooks.make_hole(lane, legs, self._hooks.last_deadline(step)),
            lambda hole: watch.run(lambda hole: self.link.step(lane, plan, hole, legs), hole),
        )
        with legs.time("deliver"):
            is_blamed = self._settling.settle(scheduler, step, plan, outcome)
        if outcome.fate is Fate.REFUSED and info is self.info:
            scheduler.fail(step)
            self.drain()
        elif outcome.fate is Fate.LOST and outcome.error is not None:
            if outcome.is_unseen:
                self._flights.end(step)
            self._lose(info, outcome.error, outcome.is_hung, watch.at)
        elif is_blamed and self._has_other():
            self._lose(info, Unavailable("it has computed something that is not finite"))
        if outcome.result is not None:
            self._hooks.step_done(step, time.perf_counter() - begin, legs)
        elif outcome.error is not None:
            self._hooks.step_failed(step, time.perf_counter() - begin, outcome.error)
        self._flights.end(step)
        self._hand_over()
        self._give_way()

    def _recover(self, step: Step | None, error: Exception) -> None:
        """After a bug on a lane: no request may wait for ever for a step that nobody drives."""
        concerned = about(request_ids=[] if step is None else step.request_ids)
        logger.critical("a bug in cell %d: %s", self.index, error, exc_info=error, extra=concerned)
        self.counters.lane_restarts += 1
        failure = bug_in_step(error)
        try:
            self._settling.give_up(self.scheduler, step, failure)
        except Exception as unsound:
            logger.critical("the books of cell %d are lost, all its requests end", self.index, exc_info=unsound)
            self.counters.book_errors += 1
            self._start_over(failure)
        self._hand_over()

    def _start_over(self, failure: GrokmoeError) -> None:
        """Ends all requests and begins with empty books. The worker runs its steps one after another, so what it still
        does for the old ones is over before it writes to the pages for new ones."""
        self._flights.cut_off_all()
        settings, ledger = self.scheduler.settings, self.scheduler.ledger
        self.scheduler = Scheduler(settings, PageLedger(ledger.num_pages, ledger.page_size))
        self._settling.end_all(self._hooks.sequences(), failure)

    def _has_other(self) -> bool:
        return bool(self._hooks.others())

    async def _bring_adapters(self, info: AttentionInfo) -> AttentionInfo:
        return await self._hooks.bring(info)

    def can_compute(self, request: Request) -> bool:
        """Whether it has the request's adapter, or will have when it is back."""
        return not request.adapter_id or self.state is not WorkerState.READY or request.adapter_id in self.adapter_ids

    def _adopt(self, info: AttentionInfo) -> None:
        """Starts anew with empty pages; sequences that waited for the worker's return go on waiting for a step."""
        waiting = self.scheduler.drain_all() if self.info is not None else []
        limit = min(self._settings.max_step_tokens, info.max_step_tokens)
        settings = dataclasses.replace(self._settings, max_step_tokens=limit)
        self.scheduler = Scheduler(settings, PageLedger(info.num_pages, info.page_size))
        if self.info is None or info.incarnation != self.info.incarnation:
            self._tempo.start_over()
            self._loss.close()
        else:
            self._loss.acquit()
        self._flights.cut_off_all()
        self.info, self._is_lost = info, False
        self._enter(WorkerEvent.ANSWERED)
        self._hooks.rehome(waiting)
        self._hooks.changed()
        self._hooks.adopted()
        self._lanes.open()

    def _lose(self, info: AttentionInfo, error: GrokmoeError, is_hung: bool = False, stage: str = "") -> None:
        """The worker is gone, or is another incarnation: its pages are. Only the first lane to notice acts.

        stage: of a pipeline, the one that is; who is in another has nothing to do with it. Empty: not known.
        """
        if info is not self.info or self._is_lost:
            return
        self._is_lost = True
        concerned = about(request_ids=sorted({name for step in self._flights for name in step.request_ids}))
        logger.warning("%s is lost: %s%s", self.name, stage and f"{stage}: ", error.message, extra=concerned)
        self.counters.losses += 1
        self.counters.hangs += is_hung
        self._lanes.stop()
        self._enter(WorkerEvent.FAILED)
        chunks = [chunk for step in self._flights.steps_at(stage) for chunk in step.chunks]
        self._loss = Loss(chunk.sequence for chunk in chunks if not chunk.sequence.is_over)
        self.counters.migrations += len(self._loss.victims)
        if is_hung and self._loss.victims:
            self._inquest = asyncio.create_task(self._find_out(self._loss), name=f"is {self.name} alive")
        self._flights.cut_off_all()
        self._hooks.rehome(self.scheduler.drain_all())
        self._hooks.changed()
        self.seek()

    async def _find_out(self, loss: Loss) -> None:
        """Whether a worker that was given up has hung, or is slow: then its sequences count nothing, and it gets no
        work that others can do for a while."""
        if await is_alive(self.link, self.care.alive_within):
            logger.warning("%s is alive, but slow", self.name)
            self.pace.alarm()
            loss.void()

    def _doubt(self, info: AttentionInfo, error: GrokmoeError) -> None:
        if not self.scheduler.num_in_flight:
            self._lose(info, error)
        elif self._stop_lanes(WorkerEvent.FAILED):
            logger.warning("%s gets no more work: %s", self.name, error.message)
            self.seek()

    def _became_slow(self) -> None:
        logger.warning("%s is slow beside the others", self.name)
        if self._leaving.room:
            self._flights.abandon_all()  # the rest of a step may take as long again

    def _give_way(self) -> None:
        """Lets as many sequences leave a slow worker as have room with better ones."""
        if self.state is WorkerState.READY and self.is_slow:
            self._leaving.some_leave(self.scheduler)

    def _hand_over(self) -> None:
        """Lets the sequences go once nothing of a worker that gets no more work is in flight."""
        if self.state is not WorkerState.READY and not self.scheduler.num_in_flight and self._has_other():
            self._leaving.all_leave(self.scheduler)
