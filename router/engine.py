"""The router's heart: takes requests in, spreads them over attention cells, hands tokens out.

What computes a step is a cell (router.cell); what fills its holes is a MoE (router.moe). Here they are put together,
and nothing here computes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import torch

from grokmoe.errors import AlreadyExists, ConfigError, GrokmoeError, Reason, Unavailable
from grokmoe.model_config import ModelConfig
from grokmoe.telemetry import RouterMetrics
from router.admission import Admission, AdmissionSettings, CallContext
from router.cell import AttentionCell, CellHooks
from router.experts import ExpertPool
from router.fair_share import FairShare
from router.generation import NOBODY, Generation
from router.legs import Legs
from router.moe import RowCounter
from router.sequence import Request
from router.sequence import Sequence as Sequence_
from router.step import SchedulerSettings
from router.step_report import StepReport
from router.transport.base import AttentionLink, Hole
from router.worker_state import WorkerState

logger = logging.getLogger(__name__)

JOIN_INTERVAL = 0.2
"""Pause between two attempts to reach workers at start, seconds."""

Connect = Callable[[], Coroutine[Any, Any, None]]
ProgressLine = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Limits of admission and of start-up."""

    scheduler: SchedulerSettings
    admission: AdmissionSettings = dataclasses.field(default_factory=AdmissionSettings)
    join_timeout: float = 600.0
    """Seconds the workers have to be reachable at start."""


class Engine:
    """Requests in, generations out."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        attention_links: Sequence[AttentionLink],
        make_hole: Callable[[int, Legs], Hole],
        pool: ExpertPool | None,
        counter: RowCounter,
        settings: EngineSettings,
        metrics: RouterMetrics,
    ) -> None:
        """make_hole: (lane, legs) -> who fills the MoE. Lanes of different cells have different numbers.

        pool: the remote experts to wait for at start; None when they are in this process.
        """
        self.config, self.pool, self.counter, self.settings, self.metrics = config, pool, counter, settings, metrics
        num_lanes = settings.scheduler.num_lanes
        self.cells = [
            AttentionCell(
                index,
                link,
                config,
                dtype,
                settings.scheduler,
                CellHooks(
                    make_hole=lambda lane, legs, first=index * num_lanes: make_hole(first + lane, legs),  # type: ignore[misc]
                    generation_of=lambda sequence: self._generations.get(sequence),
                    step_done=lambda *args: self.report.step_done(*args),
                    rehome=self._rehome,
                    ended=self._forget,
                ),
            )
            for index, link in enumerate(attention_links)
        ]
        self._generations: dict[Sequence_, Generation] = {}
        self._cell_of: dict[Sequence_, AttentionCell] = {}
        self._by_id: dict[str, Generation] = {}
        self._share, self.admission = FairShare(), Admission(settings.admission)
        self.report = StepReport(metrics, self.cells, counter)
        metrics.running.set_function(lambda: self.num_running)
        metrics.waiting.set_function(lambda: self.num_waiting)

    async def start(self, progress: ProgressLine = lambda line: None) -> None:
        """Waits until all workers are there and agree on the model, then starts the lanes.

        progress: receives a line whenever a worker joins or the wait goes on.
        Raises ConfigError when a worker serves another model or takes fewer rows than a step may have, or an expert
        has no holder; Unavailable after `join_timeout`.
        """
        joins: list[tuple[str, str, Connect]] = [
            (f"attention worker {cell.index}", cell.link.address, cell.connect) for cell in self.cells
        ]
        if self.pool is not None:
            for member in self.pool.members:
                connect = _bind(self.pool, member.index)
                joins.append((f"expert worker {member.index}", member.link.address, connect))
        joined = itertools.count(1)

        async def join(who: str, address: str, connect: Connect) -> None:
            while True:
                try:
                    await connect()
                except ConfigError:
                    raise
                except (GrokmoeError, TimeoutError) as error:
                    logger.debug("waiting for %s at %s: %s", who, address, error)
                    await asyncio.sleep(JOIN_INTERVAL)
                    continue
                progress(f"{who} at {address} joined ({next(joined)} of {len(joins)})")
                return

        try:
            async with asyncio.timeout(self.settings.join_timeout):
                async with asyncio.TaskGroup() as group:
                    for who, address, connect in joins:
                        group.create_task(join(who, address, connect))
        except TimeoutError:
            missing = [f"attention worker {cell.index} at {cell.link.address}" for cell in self.cells if not cell.info]
            for member in self.pool.members if self.pool else ():
                if member.info is None:
                    missing.append(f"expert worker {member.index} at {member.link.address}")
            raise Unavailable(f"not reachable within {self.settings.join_timeout:g} s: {', '.join(missing)}") from None
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        if self.pool is not None:
            self.pool.place()
            self.pool.check_rows(max(cell.scheduler.settings.max_step_tokens for cell in self.cells))
        for cell in self.cells:
            cell.start()

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
        """Asserts the invariants of all ledgers and that every sequence has its request."""
        for cell in self.cells:
            cell.scheduler.check()
        assert self._generations.keys() == self._cell_of.keys(), "a request without a cell"
        assert {id(each) for each in self._generations.values()} == {id(each) for each in self._by_id.values()}
        assert len(self._generations) == self.num_running + self.num_waiting, "orphan request"

    def _least_loaded(self) -> AttentionCell:
        ready = [cell for cell in self.cells if cell.state is WorkerState.READY]
        usable = ready or [cell for cell in self.cells if cell.info is not None]
        if not usable:
            raise Unavailable("no attention worker has joined yet", reason=Reason.WORKER_UNAVAILABLE)
        return min(usable, key=lambda cell: cell.load)

    def _rehome(self, lost: AttentionCell, sequences: list[Sequence_]) -> None:
        for sequence in sequences:
            cell = self._least_loaded()
            try:
                cell.add(sequence)
            except GrokmoeError as error:  # only a cell with fewer pages than the lost one can refuse
                self._generations[sequence].fail(error)
                self._forget(sequence)
            else:
                self._cell_of[sequence] = cell

    def _forget(self, sequence: Sequence_) -> None:
        self._cell_of.pop(sequence, None)
        generation = self._generations.pop(sequence, None)
        if generation:
            self.admission.ended(generation.call.caller)
        # The id is free once no candidate lives, also if the client has not taken the last tokens yet.
        if generation and not any(other in self._generations for other in generation.sequences):
            del self._by_id[generation.request.request_id]


def _bind(pool: ExpertPool, index: int) -> Connect:
    return lambda: pool.connect(pool.members[index])
