"""The router's heart: takes requests in, spreads them over attention cells, hands tokens out.

What computes a step is a cell (router.cell); what fills its holes is a MoE (router.moe). Here they are put together,
and nothing here computes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import torch

from grokmoe.errors import AlreadyExists, ConfigError, GrokmoeError, Reason, Unavailable
from grokmoe.model_config import ModelConfig
from grokmoe.telemetry import RouterMetrics
from router.admission import Admission, AdmissionSettings, CallContext
from router.attention_member import CellSettings
from router.cell import AttentionCell, CellHooks, MakeHole
from router.experts import ExpertMember, ExpertPool
from router.fair_share import FairShare
from router.fault_counters import FaultCounters
from router.generation import NOBODY, Generation
from router.joining import Join, ProgressLine, join_all
from router.moe import RowCounter
from router.sequence import Request
from router.sequence import Sequence as Sequence_
from router.step import SchedulerSettings
from router.step_report import StepReport
from router.transport.base import AttentionLink
from router.worker_state import WorkerState

logger = logging.getLogger(__name__)

Connect = Callable[[], Coroutine[Any, Any, None]]
ServingHook = Callable[[bool], None]


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Limits of admission, of start-up and of what is done about faults."""

    scheduler: SchedulerSettings
    admission: AdmissionSettings = dataclasses.field(default_factory=AdmissionSettings)
    join_timeout: float = 600.0
    """Seconds the workers have to be reachable at start."""
    max_migrations: int = 5
    """Times a sequence may be in a step on a worker that is then lost. One more, and its request ends: it may be what
    kills them, and must not take the whole cluster down. Preemptions and workers that drain do not count."""
    check_interval: float = 0.0
    """Seconds between two checks of all books while there is nothing to do; 0: never."""
    care: CellSettings = dataclasses.field(default_factory=CellSettings)
    """How attention workers are looked after."""

    def __post_init__(self) -> None:
        for name in ("max_migrations", "check_interval"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least 0")


class Engine:
    """Requests in, generations out."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        attention_links: Sequence[AttentionLink],
        make_hole: MakeHole,
        pool: ExpertPool | None,
        counter: RowCounter,
        settings: EngineSettings,
        metrics: RouterMetrics,
    ) -> None:
        """make_hole: see `MakeHole`. Lanes of different cells have different numbers.

        pool: the remote experts to wait for at start; None when they are in this process.
        """
        self.config, self.pool, self.counter, self.settings, self.metrics = config, pool, counter, settings, metrics
        self.faults = FaultCounters()
        self.on_serving: list[ServingHook] = []
        self._dtype, self._make_hole = dtype, make_hole
        self._num_cells_ever = 0
        self.cells: list[AttentionCell] = []
        for link in attention_links:
            self._enlist(link)
        self._leaving: dict[AttentionCell, asyncio.Task[None]] = {}
        self._cells_changed = asyncio.Event()
        self._was_serving = False
        self._checking: asyncio.Task[None] | None = None
        self._generations: dict[Sequence_, Generation] = {}
        self._cell_of: dict[Sequence_, AttentionCell] = {}
        self._by_id: dict[str, Generation] = {}
        self._share, self.admission = FairShare(), Admission(settings.admission)
        self.report = StepReport(metrics, self.cells, counter)
        metrics.running.set_function(lambda: self.num_running)
        metrics.waiting.set_function(lambda: self.num_waiting)
        if pool is not None:
            pool.on_change.append(self._tell_serving)

    def _enlist(self, link: AttentionLink) -> AttentionCell:
        index, first_lane = self._num_cells_ever, self._num_cells_ever * self.settings.scheduler.num_lanes
        self._num_cells_ever += 1
        hooks = CellHooks(
            make_hole=lambda lane, legs, deadline: self._make_hole(first_lane + lane, legs, deadline),
            generation_of=lambda sequence: self._generations.get(sequence),
            step_done=lambda *args: self.report.step_done(*args),
            rehome=self._rehome,
            ended=self._forget,
            failed=self._fail,
            sequences_of=lambda cell: [sequence for sequence, its in self._cell_of.items() if its is cell],
            others=lambda cell: [other for other in self._usable_cells() if other is not cell],
            changed=self._cell_changed,
        )
        scheduler, care = self.settings.scheduler, self.settings.care
        cell = AttentionCell(index, link, self.config, self._dtype, scheduler, hooks, care, self.faults)
        self.cells.append(cell)
        return cell

    async def start(self, progress: ProgressLine = lambda line: None) -> None:
        """Waits until all workers are there and agree on the model, then starts the lanes.

        progress: receives a line whenever a worker joins or the wait goes on.
        Raises ConfigError when a worker serves another model or takes fewer rows than a step may have, or an expert
        has no holder; Unavailable after `join_timeout`.
        """
        joins = [Join(f"attention worker {cell.index}", cell.link.address, cell.connect) for cell in self.cells]
        if self.pool is not None:
            for member in self.pool.members:
                connect = _bind(self.pool, member)
                joins.append(Join(f"expert worker {member.index}", member.link.address, connect))
        await join_all(joins, self.settings.join_timeout, progress)
        if self.pool is not None:
            self.pool.place()
            self.pool.check_rows(max(cell.scheduler.settings.max_step_tokens for cell in self.cells))
            self.pool.rebalancer.start(self.counter.rows_LE)
        for cell in self.cells:
            cell.start()
        if self.settings.check_interval:
            self._checking = asyncio.create_task(self._check_when_idle(), name="idle check")
        self._tell_serving()

    def add_cell(self, link: AttentionLink) -> AttentionCell:
        """An attention worker more, used as soon as it has described itself and fits."""
        cell = self._enlist(link)
        cell.start()
        cell.seek()
        return cell

    def remove_cell(self, cell: AttentionCell) -> asyncio.Task[None]:
        """Takes a worker out of use; the task ends when it is forgotten.

        It gets no new requests, and its sequences move when its steps in flight have ended. While no other worker is in
        use it goes on: a list of addresses that is empty for a moment must not stop the service.
        """
        if cell not in self._leaving:
            self._leaving[cell] = asyncio.create_task(self._retire(cell), name=f"retire cell {cell.index}")
        return self._leaving[cell]

    async def _retire(self, cell: AttentionCell) -> None:
        while cell.load:
            if self._has_successor(cell):
                cell.retire()
            self._cells_changed.clear()
            await self._cells_changed.wait()
        self.cells.remove(cell)
        del self._leaving[cell]
        await cell.close()
        logger.info("%s has left", cell.name)
        self._tell_serving()

    @property
    def is_serving(self) -> bool:
        """Whether a request could be computed now: an attention worker is in use, and a holder of every expert."""
        if not any(cell.state is WorkerState.READY for cell in self.cells):
            return False
        return self.pool is None or _has_all_experts(self.pool)

    def check_room(self, call: CallContext, count: int = 1, num_tokens: int = 0) -> None:
        """Raises ResourceExhausted when the queue has no room for `count` sequences of so many prompt tokens each."""
        schedulers = [cell.scheduler for cell in self.cells if cell.info]
        self.admission.check(
            call.caller,
            count,
            num_tokens,
            self.num_waiting,
            sum(scheduler.num_waiting_tokens for scheduler in schedulers),
            sum(scheduler.ledger.num_pages * scheduler.ledger.page_size for scheduler in schedulers),
        )

    def submit(self, request: Request, call: CallContext = NOBODY) -> Generation:
        """Takes a request in. `Generation.take` gives its tokens; `cancel` must be called if it is left early.

        Raises InvalidRequest when it could never be served, AlreadyExists when one of its id is alive,
        ResourceExhausted when too many wait.
        """
        if request.request_id in self._by_id:
            raise AlreadyExists(f"request_id: {request.request_id} is the id of a request that is alive")
        self.check_room(call, request.n, len(request.prompt_ids))
        cost = len(request.prompt_ids) + request.max_tokens
        places = self._share.place(call.caller, cost, call.priority, request.n)
        sequences = [Sequence_(request, place, index) for index, place in enumerate(places)]
        cell = self._least_loaded()
        cell.check(request)
        generation = Generation(request, call, sequences, self._begun)
        self.admission.added(call.caller, request.n)
        self._limit_wait(generation)
        self._by_id[request.request_id] = generation
        for sequence in sequences:
            cell.add(sequence)
            self._generations[sequence], self._cell_of[sequence] = generation, cell
        self.metrics.prompt_tokens.inc(len(request.prompt_ids))
        return generation

    def _begun(self, generation: Generation) -> None:
        """A request takes part in its first step."""
        self.admission.begun(time.monotonic())
        self._share.admitted(generation.sequences[0].arrival, generation.call.priority)

    def _limit_wait(self, generation: Generation) -> None:
        """Refuses a request after all that waits longer than `queue_timeout` for its first step."""
        timeout = self.settings.admission.queue_timeout
        if not timeout:
            return

        def expire() -> None:
            if generation.scheduled_at is None and generation.ended_at is None:
                generation.fail(self.admission.timed_out(timeout, self.num_waiting))
                self.cancel(generation)

        asyncio.get_running_loop().call_later(timeout, expire)

    def cancel(self, generation: Generation) -> None:
        """Ends a request that nobody waits for any more. Harmless when it has ended."""
        for sequence in generation.sequences:
            self.cancel_candidate(generation, sequence.index)

    def cancel_candidate(self, generation: Generation, index: int) -> bool:
        """Ends one candidate; False if it has ended already. Its client is not told."""
        sequence = generation.sequences[index]
        cell = self._cell_of.get(sequence)
        if cell is None:
            return False
        cell.cancel(sequence)
        self._forget(sequence)
        return True

    def abort(self, request_id: str) -> bool:
        """Ends a request by its id; its client gets what there is, with FinishReason.ABORTED. False: none is alive."""
        generation = self._by_id.get(request_id)
        if generation is None:
            return False
        for sequence in generation.sequences:
            if self.cancel_candidate(generation, sequence.index):
                generation.abort(sequence)
        return True

    async def close(self) -> None:
        """Ends lanes and links. Whoever still waits for tokens gets Unavailable."""
        for task in (self._checking, *self._leaving.values()):
            if task is not None:
                task.cancel()
        for generation in list(self._by_id.values()):
            generation.fail(Unavailable("the service is shutting down", reason=Reason.SHUTTING_DOWN))
            self.cancel(generation)
        for cell in self.cells:
            await cell.close()
        if self.pool is not None:
            await self.pool.close()

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return sum(cell.scheduler.num_running for cell in self.cells if cell.info)

    @property
    def num_waiting(self) -> int:
        """Sequences without pages."""
        return sum(cell.scheduler.num_waiting for cell in self.cells if cell.info)

    def check(self) -> None:
        """Asserts the invariants of all ledgers, and that every sequence has its request and its cell, and back."""
        for cell in self.cells:
            cell.check_books()
        assert self._generations.keys() == self._cell_of.keys(), "a request without a cell"
        assert {id(each) for each in self._generations.values()} == {id(each) for each in self._by_id.values()}
        assert len(self._generations) == self.num_running + self.num_waiting, "orphan request"
        for sequence, cell in self._cell_of.items():
            assert not sequence.is_over, f"is over and still kept: {sequence}"
            assert cell in self.cells, f"in a cell that has left: {sequence}"

    async def _check_when_idle(self) -> None:
        while True:
            await asyncio.sleep(self.settings.check_interval)
            if self._generations:
                continue
            try:
                self.check()
            except AssertionError as error:
                self.faults.book_errors += 1
                logger.critical("an invariant does not hold while idle: %s", error)

    def _usable_cells(self) -> list[AttentionCell]:
        return [cell for cell in self.cells if cell.state is WorkerState.READY and cell not in self._leaving]

    def _has_successor(self, cell: AttentionCell) -> bool:
        return any(other is not cell for other in self._usable_cells())

    def _least_loaded(self) -> AttentionCell:
        joined = [cell for cell in self.cells if cell.info is not None]
        ready = [cell for cell in joined if cell.state is WorkerState.READY]
        # Who is about to leave is used only if there is nobody else, who is lost only to wait in.
        usable = self._usable_cells() or ready or [cell for cell in joined if cell not in self._leaving] or joined
        if not usable:
            raise Unavailable("no attention worker has joined yet", reason=Reason.WORKER_UNAVAILABLE)
        # Who is slow is used only if nobody else has room.
        return min(usable, key=lambda cell: (cell.reluctance, cell.load))

    def _rehome(self, lost: AttentionCell, sequences: list[Sequence_]) -> None:
        failed: list[tuple[Sequence_, GrokmoeError]] = []
        for sequence in sequences:
            if sequence.num_migrations > self.settings.max_migrations:
                self.faults.migration_limits += 1
                times = f"its attention worker was lost {sequence.num_migrations} times while computing it"
                failed.append((sequence, Unavailable(times, reason=Reason.WORKER_UNAVAILABLE)))
                continue
            try:
                cell = self._least_loaded()
                cell.add(sequence)
            except GrokmoeError as refusal:  # only a cell with fewer pages than the lost one can refuse
                failed.append((sequence, refusal))
            else:
                self._cell_of[sequence] = cell
        # Only now: it cancels the other candidates of a request, which must be in a cell or over.
        for sequence, _ in failed:
            sequence.cancel()
        for sequence, error in failed:
            self._fail(sequence, error)
        self._cells_changed.set()

    def _fail(self, sequence: Sequence_, error: GrokmoeError) -> None:
        """Ends the request of a sequence, with all its candidates, if it is alive."""
        generation = self._generations.get(sequence)
        if generation is not None:
            generation.fail(error)
            self.cancel(generation)

    def _cell_changed(self, cell: AttentionCell) -> None:
        """A worker is in use again, or no longer."""
        if cell.state is WorkerState.READY:
            for other in self.cells:
                if other is not cell:
                    self._rehome(other, other.take_stranded())
                    other.rearm()
        self._cells_changed.set()
        self._tell_serving()

    def _tell_serving(self) -> None:
        """Calls `on_serving` when `is_serving` has another value."""
        is_serving = self.is_serving
        if is_serving != self._was_serving:
            self._was_serving = is_serving
            logger.log(logging.INFO if is_serving else logging.WARNING, "serving: %s", is_serving)
            for call in self.on_serving:
                call(is_serving)

    def _forget(self, sequence: Sequence_) -> None:
        self._cell_of.pop(sequence, None)
        generation = self._generations.pop(sequence, None)
        if generation:
            self.admission.ended(generation.call.caller)
        # The id is free once no candidate lives, also if the client has not taken the last tokens yet.
        if generation and not any(other in self._generations for other in generation.sequences):
            del self._by_id[generation.request.request_id]
        self._cells_changed.set()


def _has_all_experts(pool: ExpertPool) -> bool:
    if pool.placement is None:
        return False
    usable = {member.index for member in pool.members if member.is_usable}
    return all(usable.intersection(holders) for layer in pool.placement.holders for holders in layer)


def _bind(pool: ExpertPool, member: ExpertMember) -> Connect:
    return lambda: pool.connect(member)
