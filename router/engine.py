"""The router's heart: takes requests in, spreads them over attention cells, hands tokens out.

What computes a step is a cell (router.cell); what fills its holes is a MoE (router.moe). Here they are put together,
and nothing here computes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import torch

from grokmoe.errors import ConfigError, GrokmoeError
from grokmoe.model_config import ModelConfig
from grokmoe.telemetry import RouterMetrics
from router.adapters import Adapters
from router.admission import Admission, AdmissionSettings, CallContext
from router.attention_member import CellSettings
from router.cell import AttentionCell, CellHooks, MakeHole
from router.experts import ExpertMember, ExpertPool
from router.fault_counters import FaultCounters
from router.fleet import Fleet
from router.generation import NOBODY, Generation
from router.intake import Intake
from router.joining import Join, ProgressLine, join_all
from router.legs import Legs
from router.moe import RowCounter
from router.register import Register
from router.request import Request
from router.step import SchedulerSettings, Step
from router.step_report import StepReport
from router.step_traces import StepTraces
from router.transport.base import AttentionLink

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
        self.traces: StepTraces | None = None
        self._dtype, self._make_hole = dtype, make_hole
        self._register = Register()
        self._fleet = Fleet(
            self._register,
            self.faults,
            settings.max_migrations,
            lambda *args: self._intake.fail(*args),
            self._tell_serving,
        )
        self.adapters = Adapters(lambda: self.cells)
        self._intake = Intake(settings.admission, self._register, self._fleet, self.adapters)
        self._num_cells_ever = self._num_lanes_ever = 0
        self._was_serving = False
        self._checking: asyncio.Task[None] | None = None
        self.report = StepReport(metrics, self.cells, counter)
        for link in attention_links:
            self._enlist(link)
        metrics.running.set_function(lambda: self.num_running)
        metrics.waiting.set_function(lambda: self.num_waiting)
        if pool is not None:
            pool.on_change.append(self._tell_serving)

    def _enlist(self, link: AttentionLink) -> AttentionCell:
        index, first_lane = self._num_cells_ever, self._num_lanes_ever
        # A step for every stage of a pipeline: with fewer, stages wait for one another.
        num_lanes = max(self.settings.scheduler.num_lanes, link.num_stages)
        self._num_cells_ever, self._num_lanes_ever = index + 1, first_lane + num_lanes
        hooks = CellHooks(
            make_hole=lambda lane, legs, deadline: self._make_hole(first_lane + lane, legs, deadline),
            generation_of=self._register.generation_of,
            step_begins=self._step_begins,
            step_done=lambda *args: self._step_done(cell, *args),
            step_failed=lambda *args: self._step_failed(cell, *args),
            rehome=self._fleet.rehome,
            ended=self._intake.forget,
            failed=self._intake.fail,
            sequences=lambda: self._register.sequences_of(cell),
            others=lambda: self._fleet.others(cell),
            changed=lambda: self._fleet.cell_changed(cell),
            bring=lambda info: self.adapters.bring(link, info),
            adopted=lambda: self.adapters.adopted(cell),
        )
        scheduler = dataclasses.replace(self.settings.scheduler, num_lanes=num_lanes)
        care = self.settings.care
        cell = AttentionCell(index, link, self.config, self._dtype, scheduler, hooks, care, self.faults)
        self._fleet.add(cell)
        return cell

    def _step_begins(self, step: Step) -> tuple[str, ...]:
        return () if self.traces is None else self.traces.step_begins(step)

    def _step_done(self, cell: AttentionCell, step: Step, seconds: float, legs: Legs) -> None:
        self.report.step_done(cell, step, seconds, legs)
        if self.traces is not None:
            self.traces.step_done(cell.link.address, step, seconds, legs)

    def _step_failed(self, cell: AttentionCell, step: Step, seconds: float, error: GrokmoeError) -> None:
        if self.traces is not None:
            self.traces.step_failed(cell.link.address, step, seconds, error.message)

    @property
    def cells(self) -> list[AttentionCell]:
        """The attention workers, in the order in which they came."""
        return self._fleet.cells

    @property
    def admission(self) -> Admission:
        """Who may wait, and who was refused."""
        return self._intake.admission

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
        await self.adapters.settle()
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
        return self._fleet.remove(cell)

    @property
    def is_serving(self) -> bool:
        """Whether a request could be computed now: an attention worker is in use, and a holder of every expert."""
        return self._fleet.is_in_use and (self.pool is None or _has_all_experts(self.pool))

    def check_room(self, call: CallContext, count: int = 1, num_tokens: int = 0) -> None:
        """Raises ResourceExhausted when the queue has no room for `count` sequences of so many prompt tokens each."""
        self._intake.check_room(call, count, num_tokens)

    def submit(self, request: Request, call: CallContext = NOBODY) -> Generation:
        """Takes a request in. `Generation.take` gives its tokens; `cancel` must be called if it is left early.

        Raises InvalidRequest when it could never be served, AlreadyExists when one of its id is alive,
        ResourceExhausted when too many wait.
        """
        generation = self._intake.submit(request, call)
        self.metrics.prompt_tokens.inc(len(request.prompt_ids))
        generation.on_gap = self.metrics.inter_token_latency.observe
        if self.traces is not None:
            self.traces.begin(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """Ends a request that nobody waits for any more. Harmless when it has ended."""
        self._intake.cancel(generation)
        if self.traces is not None:
            self.traces.end(generation)

    def cancel_candidate(self, generation: Generation, index: int) -> bool:
        """Ends one candidate; False if it has ended already. Its client is not told."""
        return self._intake.cancel_candidate(generation, index)

    def abort(self, request_id: str) -> bool:
        """Ends a request by its id; its client gets what there is, with FinishReason.ABORTED. False: none is alive."""
        return self._intake.abort(request_id)

    async def close(self) -> None:
        """Ends lanes and links. Whoever still waits for tokens gets Unavailable."""
        if self._checking is not None:
            self._checking.cancel()
        self._fleet.stop_leaving()
        self._intake.fail_all()
        await self.adapters.close()
        await self._fleet.close()
        if self.pool is not None:
            await self.pool.close()
        if self.traces is not None:
            await self.traces.close()

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return self._fleet.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences without pages."""
        return self._fleet.num_waiting

    def check(self) -> None:
        """Asserts the invariants of all ledgers, and that every sequence has its request and its cell, and back."""
        for cell in self.cells:
            cell.check_books()
        self._register.check(self.cells)
        self.adapters.table.check(self._register.num_with_adapter)
        assert self._register.num_sequences == self.num_running + self.num_waiting, "orphan request"

    async def _check_when_idle(self) -> None:
        while True:
            await asyncio.sleep(self.settings.check_interval)
            if self._register.num_sequences:
                continue
            try:
                self.check()
            except AssertionError as error:
                self.faults.book_errors += 1
                logger.critical("an invariant does not hold while idle: %s", error)

    def _tell_serving(self) -> None:
        """Calls `on_serving` when `is_serving` has another value."""
        is_serving = self.is_serving
        if is_serving != self._was_serving:
            self._was_serving = is_serving
            logger.log(logging.INFO if is_serving else logging.WARNING, "serving: %s", is_serving)
            for call in self.on_serving:
                call(is_serving)


def _has_all_experts(pool: ExpertPool) -> bool:
    if pool.placement is None:
        return False
    usable = {member.index for member in pool.members if member.is_usable}
    return all(usable.intersection(holders) for layer in pool.placement.holders for holders in layer)


def _bind(pool: ExpertPool, member: ExpertMember) -> Connect:
    return lambda: pool.connect(member)
