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
from collections.abc import Callable, Collection
from typing import Protocol, runtime_checkable

import torch

from grokmoe.errors import FailedPrecondition, GrokmoeError, InternalError, Reason, Unavailable
from grokmoe.model_config import ModelConfig
from grokmoe.step_plan import StepPlan, StepResult
from router.attention_member import AttentionMember, CellSettings
from router.experts import ExpertsUnavailable
from router.fault_counters import FaultCounters
from router.generation import Generation
from router.legs import Legs
from router.pages import PageLedger
from router.plan_writer import read_extras, write_plan
from router.scheduler import Scheduler
from router.sequence import Request, Sequence
from router.step import SchedulerSettings, Step
from router.step_deadline import StepDeadline
from router.step_pace import Pace, StepPace
from router.step_times import StepTimes, work_of
from router.step_watch import StepAbandoned, StepHung, StepWatch
from router.transport.base import AttentionInfo, AttentionLink, Hole, StepNotBegun
from router.worker_state import WorkerEvent, WorkerState

logger = logging.getLogger(__name__)

MAX_FAULTS = 1
"""Times that a sequence may come out as something that is not finite and be recomputed."""


@runtime_checkable
class ReportsFaults(Protocol):
    """A hole that knows of rows for which the experts have no finite answer: it gave NaN for them."""

    faulty_rows: Collection[int]
    """Tokens of the step, by their place in it."""


MakeHole = Callable[[int, Legs, float | None], Hole]
"""(lane, legs, deadline) -> who fills the MoE of a step. deadline: time.monotonic() after which nobody waits for it."""


@dataclasses.dataclass(frozen=True)
class CellHooks:
    """What a cell needs of the engine."""

    make_hole: MakeHole
    """Who fills the MoE of a step."""
    generation_of: Callable[[Sequence], Generation | None]
    """The generation a sequence belongs to; None when the client has gone."""
    step_done: Callable[[AttentionCell, Step, float, Legs], None]
    """(cell, step, seconds, legs): for metrics."""
    rehome: Callable[[AttentionCell, list[Sequence]], None]
    """Finds another cell, or this one again, for the sequences of a worker that was lost or drains."""
    ended: Callable[[Sequence], None]
    """A sequence has ended, well or not."""
    failed: Callable[[Sequence, GrokmoeError], None]
    """The request of a sequence, if it is alive, ends with an error."""
    sequences_of: Callable[[AttentionCell], list[Sequence]]
    """All that the engine believes to be in a cell."""
    others: Callable[[AttentionCell], list[AttentionCell]]
    """The other cells that are in use."""
    changed: Callable[[AttentionCell], None]
    """The state of a cell is another one."""


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
        self._deadline = StepDeadline(self.care.deadline)
        self.pace = StepPace(self.care.pace)
        self._inquest: asyncio.Task[None] | None = None
        self._is_lost = True
        self._victims: list[Sequence] = []
        self._flights: dict[Step, StepWatch] = {}
        self._work = asyncio.Event()
        self._ready = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Starts the lanes."""
        self._tasks = [
            asyncio.create_task(self._run_lane(lane), name=f"cell-{self.index}-lane-{lane}")
            for lane in range(self._settings.num_lanes)
        ]

    def check(self, request: Request) -> None:
        """Raises InvalidRequest when the request could never be served here."""
        self.scheduler.check_fits(request)

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence. Raises InvalidRequest when it could never be served here."""
        self.scheduler.add(sequence)
        self._work.set()

    def cancel(self, sequence: Sequence) -> None:
        """Forgets a sequence. A step that nobody else takes part in is abandoned, whatever it waits for."""
        self.scheduler.cancel(sequence)
        if sequence.in_flight:
            for step, watch in self._flights.items():
                if all(chunk.sequence.is_over for chunk in step.chunks):
                    watch.abandon()
        self._work.set()

    @property
    def load(self) -> int:
        """Sequences here, running and waiting."""
        return 0 if self.info is None else self.scheduler.num_running + self.scheduler.num_waiting

    @property
    def room(self) -> int:
        """Sequences more that would take part in its steps at once; 0 while there are not enough pages for those that
        are here."""
        if self.info is None or (self.scheduler.is_short and self.scheduler.num_waiting):
            return 0
        return max(0, self.scheduler.settings.max_running - self.load)

    @property
    def times(self) -> StepTimes:
        """What its answers took."""
        return self._deadline.times

    @property
    def reluctance(self) -> int:
        """How bad a place it is for one sequence more: 0, it has room, and is not slow, or on trial and idle; 1, it has
        room, and is on trial; 2, it is slow or full."""
        pace = self.pace.pace
        if not self.room or pace is Pace.SLOW:
            return 2
        return int(pace is Pace.TRIAL and self.load > 0)

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
        self._ready.clear()
        self._enter(event)
        self._hooks.changed(self)
        return True

    def rearm(self) -> None:
        """Another worker is in use now: one that is slow to answer need not be waited for any more."""
        for watch in self._flights.values():
            watch.rearm()

    def take_stranded(self) -> list[Sequence]:
        """The sequences that wait here for a worker that is not in use; they are no longer here then."""
        if self.info is None or self.state is WorkerState.READY or self.scheduler.num_in_flight:
            return []
        return self.scheduler.drain_all()

    async def close(self) -> None:
        """Ends the lanes and the link."""
        tasks = [*self._tasks, *([self._inquest] if self._inquest else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.leave()

    def check_books(self) -> None:
        """Asserts what must always hold."""
        if self.info is None:
            return
        self.scheduler.check()
        assert self.scheduler.num_in_flight <= len(self._flights), "a step in flight that nobody watches"
        assert self.state is WorkerState.READY or not self._ready.is_set(), "lanes run without a worker"

    async def _run_lane(self, lane: int) -> None:
        while True:
            await self._ready.wait()
            step = None
            try:
                step = self.scheduler.schedule()
                if step is not None:
                    await self._run_step(lane, step)
            except Exception as error:
                self._recover(step, error)
                await asyncio.sleep(self.care.restart_pause)
                continue
            if step is None:
                self._work.clear()
                await self._work.wait()
            else:
                self._work.set()

    async def _run_step(self, lane: int, step: Step) -> None:
        scheduler, info, legs = self.scheduler, self.info, Legs()
        assert info is not None
        watch = self._flights[step] = self._watch(step)
        for chunk in step.chunks:
            generation = self._hooks.generation_of(chunk.sequence)
            if generation is not None:
                generation.note_scheduled()
        plan = write_plan(step, info.incarnation)
        begin = time.perf_counter()
        try:
            hole = self._hooks.make_hole(lane, legs, self._last_deadline(step))
            result = await watch.run(lambda hole: self.link.step(lane, plan, hole, legs), hole)
            self._check_tokens(step, result)
        except StepAbandoned:
            is_wanted = not all(chunk.sequence.is_over for chunk in step.chunks)
            self.counters.abandoned_steps += scheduler.fail(step) and not is_wanted
        except ExpertsUnavailable as error:
            self._fail_requests(scheduler, step, error)
        except (Unavailable, FailedPrecondition) as error:
            if error.reason is Reason.SHUTTING_DOWN and info is self.info:
                scheduler.fail(step)
                self.drain()
            else:
                if isinstance(error, StepNotBegun):
                    self._flights.pop(step, None)
                self._lose(info, error, is_hung=isinstance(error, StepHung))
        except Exception as error:
            logger.exception("step failed")
            self._fail_requests(scheduler, step, InternalError(f"a step failed: {type(error).__name__}: {error}"))
        else:
            by_experts = _faulty_places(step, hole)
            if faulty := {*result.faulty_chunks, *by_experts}:
                self._take_faulty(scheduler, info, step, plan, result, faulty, by_experts)
            else:
                self._deliver(scheduler, step, plan, result)
            self._hooks.step_done(self, step, time.perf_counter() - begin, legs)
        self._flights.pop(step, None)
        self._hand_over()
        self._give_way()

    def _check_tokens(self, step: Step, result: StepResult) -> None:
        """Raises Unavailable for a result that no sound worker gives."""
        num_wanted = sum(chunk.wants_token for chunk in step.chunks)
        if len(result.token_ids) != num_wanted:
            raise Unavailable(f"it drew {len(result.token_ids)} tokens, {num_wanted} were due")
        if max(result.token_ids, default=0) >= self._config.vocab_size:
            raise Unavailable(f"it drew token {max(result.token_ids)}, which the vocabulary does not have")

    def _last_deadline(self, step: Step) -> float | None:
        """When nobody waits for any of the step's sequences any more; None: somebody has no deadline."""
        generations = (self._hooks.generation_of(chunk.sequence) for chunk in step.chunks)
        deadlines = [generation.call.deadline for generation in generations if generation is not None]
        known = [deadline for deadline in deadlines if deadline is not None]
        return max(known) if known and len(known) == len(deadlines) else None

    def _watch(self, step: Step) -> StepWatch:
        def work() -> int:
            # Lanes share the worker's device: an answer may have to wait for another step's.
            return sum(map(work_of, self._flights)) or work_of(step)

        def allowance() -> float | None:
            others = self._hooks.others(self)
            if not others:
                return None
            is_lenient = not self._better_ones()
            return self._deadline.allowance(work(), [other.times for other in others], is_lenient)

        def observe(seconds: float) -> None:
            done = work()
            self._deadline.observe(done, seconds)
            peers = [other.times for other in self._better_ones() if other.times.is_known(done)]
            known = [usual for times in peers if (usual := times.usual(done)) is not None]
            if self.pace.observe(seconds, min(known, default=None)):
                self._became_slow()

        return StepWatch(allowance, observe)

    def _became_slow(self) -> None:
        logger.warning("%s is slow beside the others", self.name)
        if self._room_elsewhere():
            for watch in self._flights.values():  # the rest of a step may take as long again
                watch.abandon()

    def _better_ones(self) -> list[AttentionCell]:
        """The other cells in use of which it is not known that they are slow."""
        return [other for other in self._hooks.others(self) if other.pace.pace is not Pace.SLOW]

    def _room_elsewhere(self) -> int:
        return sum(other.room for other in self._better_ones())

    def _give_way(self) -> None:
        """Lets as many sequences leave a slow worker as have room with better ones."""
        if self.state is not WorkerState.READY or self.pace.pace is not Pace.SLOW:
            return
        most = self.care.max_moves
        leaving = self.scheduler.give_up(self._room_elsewhere(), lambda sequence: sequence.num_moves < most)
        for sequence in leaving:
            sequence.num_moves += 1
        self.counters.moves += len(leaving)
        self._hooks.rehome(self, leaving)

    def _deliver(
        self, scheduler: Scheduler, step: Step, plan: StepPlan, result: StepResult, faulty: Collection[int] = ()
    ) -> None:
        logprobs = {}
        unusable = {step.chunks[place] for place in faulty}
        for extra in read_extras(step, plan, result):
            sequence = extra.chunk.sequence
            generation = self._hooks.generation_of(sequence)
            if generation is None or extra.chunk in unusable:
                continue
            if extra.logits is not None:
                generation.put_logits(extra.chunk.start, extra.logits)
            if extra.prompt_logprobs is not None:
                generation.put_prompt_logprobs(extra.chunk.start, extra.prompt_logprobs)
            if extra.logprobs is not None:
                logprobs[sequence] = extra.logprobs
        for drawn in scheduler.complete(step, result.token_ids, faulty):
            generation = self._hooks.generation_of(drawn.sequence)
            if generation is not None:
                generation.put(drawn, logprobs.get(drawn.sequence))
                if drawn.finish_reason is not None:
                    self._hooks.ended(drawn.sequence)

    def _fail_requests(self, scheduler: Scheduler, step: Step, error: GrokmoeError) -> None:
        """Ends the requests of a step that cannot be done; all others go on."""
        if scheduler.fail(step):
            for chunk in step.chunks:
                self._hooks.failed(chunk.sequence, error)

    def _take_faulty(
        self,
        scheduler: Scheduler,
        info: AttentionInfo,
        step: Step,
        plan: StepPlan,
        result: StepResult,
        faulty: Collection[int],
        by_experts: Collection[int],
    ) -> None:
        """Some chunks are not finite. The others are used; pages that these have filled must not become known."""
        self._flights.pop(step, None)
        if not scheduler.is_in_flight(step):
            return
        self._deliver(scheduler, step, plan, result, faulty)
        self.counters.faulty_chunks += len(faulty)
        is_blamed = False
        for place in faulty:
            sequence = step.chunks[place].sequence
            sequence.num_faults += 1
            if place in by_experts:
                message = "no expert worker has a finite answer for this request"
                self._hooks.failed(sequence, InternalError(message))
            elif sequence.num_faults > MAX_FAULTS:
                message = f"what {self.name} computed for this request is not finite, and was not elsewhere before"
                self._hooks.failed(sequence, InternalError(message))
            else:
                is_blamed = True
        if is_blamed and self._has_other():
            self._lose(info, Unavailable("it has computed something that is not finite"))

    def _recover(self, step: Step | None, error: Exception) -> None:
        """After a bug on a lane: no request may wait for ever for a step that nobody drives."""
        logger.critical("a bug in cell %d: %s", self.index, error, exc_info=error)
        self.counters.lane_restarts += 1
        failure = InternalError(f"a step failed: {type(error).__name__}: {error}")
        try:
            if step is None:
                raise AssertionError("no step could be scheduled")
            if self._flights.pop(step, None) is not None:
                self.scheduler.fail(step)
                for chunk in step.chunks:
                    self._hooks.failed(chunk.sequence, failure)
            self.scheduler.check()
        except Exception as unsound:
            logger.critical("the books of cell %d are lost, all its requests end", self.index, exc_info=unsound)
            self.counters.book_errors += 1
            self._start_over(failure)
        self._hand_over()

    def _start_over(self, failure: GrokmoeError) -> None:
        """Ends all requests and begins with empty books. The worker runs its steps one after another, so what it still
        does for the old ones is over before it writes to the pages for new ones."""
        self._end_flights()
        settings, ledger = self.scheduler.settings, self.scheduler.ledger
        self.scheduler = Scheduler(settings, PageLedger(ledger.num_pages, ledger.page_size))
        for sequence in self._hooks.sequences_of(self):
            if not sequence.is_over:
                sequence.cancel()
            self._hooks.failed(sequence, failure)

    def _has_other(self) -> bool:
        return bool(self._hooks.others(self))

    def _adopt(self, info: AttentionInfo) -> None:
        """Starts anew with empty pages; sequences that waited for the worker's return go on waiting for a step."""
        waiting = self.scheduler.drain_all() if self.info is not None else []
        limit = min(self._settings.max_step_tokens, info.max_step_tokens)
        settings = dataclasses.replace(self._settings, max_step_tokens=limit)
        self.scheduler = Scheduler(settings, PageLedger(info.num_pages, info.page_size))
        if self.info is None or info.incarnation != self.info.incarnation:
            self._deadline, self.pace = StepDeadline(self.care.deadline), StepPace(self.care.pace)
        else:
            for sequence in self._victims:  # it lives, so none of them has killed it
                sequence.num_acquitted += 1
        self._victims.clear()
        self._end_flights()
        self.info, self._is_lost = info, False
        self._enter(WorkerEvent.ANSWERED)
        self._hooks.rehome(self, waiting)
        self._hooks.changed(self)
        self._ready.set()
        self._work.set()

    def _lose(self, info: AttentionInfo, error: GrokmoeError, is_hung: bool = False) -> None:
        """The worker is gone, or is another incarnation: its pages are. Only the first lane to notice acts."""
        if info is not self.info or self._is_lost:
            return
        self._is_lost = True
        logger.warning("%s is lost: %s", self.name, error.message)
        self.counters.losses += 1
        self.counters.hangs += is_hung
        self._ready.clear()
        self._enter(WorkerEvent.FAILED)
        chunks = [chunk for step in self._flights for chunk in step.chunks]
        self._victims = [chunk.sequence for chunk in chunks if not chunk.sequence.is_over]
        for sequence in self._victims:
            sequence.num_migrations += 1
        self.counters.migrations += len(self._victims)
        if is_hung and self._victims:
            self._inquest = asyncio.create_task(self._find_out(self._victims), name=f"is {self.name} alive")
        self._end_flights()
        self._hooks.rehome(self, self.scheduler.drain_all())
        self._hooks.changed(self)
        self.seek()

    async def _find_out(self, victims: list[Sequence]) -> None:
        """Whether a worker that was given up has hung, or is slow: then its sequences count nothing, and it gets no
        work that others can do for a while."""
        try:
            async with asyncio.timeout(self.care.alive_within):
                await self.link.describe()
        except (GrokmoeError, TimeoutError):
            return
        logger.warning("%s is alive, but slow", self.name)
        self.pace.alarm()
        for sequence in victims:
            sequence.num_migrations -= 1
        victims.clear()

    def _doubt(self, info: AttentionInfo, error: GrokmoeError) -> None:
        if not self.scheduler.num_in_flight:
            self._lose(info, error)
        elif self._stop_lanes(WorkerEvent.FAILED):
            logger.warning("%s gets no more work: %s", self.name, error.message)
            self.seek()

    def _end_flights(self) -> None:
        """Cuts off all steps; their lanes find that nobody waits for the results."""
        for watch in self._flights.values():
            watch.abandon()
        self._flights.clear()

    def _hand_over(self) -> None:
        """Lets the sequences go once nothing of a worker that gets no more work is in flight."""
        if self.state is not WorkerState.READY and not self.scheduler.num_in_flight and self._has_other():
            leaving = self.scheduler.drain_all()
            self.counters.moves += len(leaving)
            self._hooks.rehome(self, leaving)


def _faulty_places(step: Step, hole: Hole) -> set[int]:
    """The chunks with a token for which the experts have no finite answer."""
    rows = hole.faulty_rows if isinstance(hole, ReportsFaults) else ()
    if not rows:
        return set()
    owners = [place for place, chunk in enumerate(step.chunks) for _ in chunk.token_ids]
    return {owners[row] for row in rows}
