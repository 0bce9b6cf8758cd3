"""One attention worker as the router drives it: its scheduler, its lanes, its loss and return."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable

import torch

from grokmoe.channel import TIMEOUTS
from grokmoe.errors import ConfigError, FailedPrecondition, GrokmoeError, InternalError, Unavailable
from grokmoe.model_config import ModelConfig
from grokmoe.step_plan import StepPlan, StepResult
from router.experts import ExpertsUnavailable
from router.generation import Generation
from router.legs import Legs
from router.pages import PageLedger
from router.plan_writer import read_extras, write_plan
from router.scheduler import Scheduler
from router.sequence import Request, Sequence
from router.step import SchedulerSettings, Step
from router.transport.base import AttentionInfo, AttentionLink, Hole
from router.worker_state import WorkerState

logger = logging.getLogger(__name__)

PROBE_INTERVAL = 0.25
"""Pause between two attempts to reach a worker that is lost, seconds."""


@dataclasses.dataclass(frozen=True)
class CellHooks:
    """What a cell needs of the engine."""

    make_hole: Callable[[int, Legs], Hole]
    """(lane, legs) -> who fills the MoE of a step."""
    generation_of: Callable[[Sequence], Generation | None]
    """The generation a sequence belongs to; None when the client has gone."""
    step_done: Callable[[AttentionCell, Step, float, Legs], None]
    """(cell, step, seconds, legs): for metrics."""
    rehome: Callable[[AttentionCell, list[Sequence]], None]
    """Finds another cell, or this one again, for the sequences of a worker that was lost."""
    ended: Callable[[Sequence], None]
    """A sequence has ended, well or not."""


class AttentionCell:
    """The scheduler of one worker and a task per lane. A lane is: schedule, run, complete."""

    def __init__(
        self,
        index: int,
        link: AttentionLink,
        config: ModelConfig,
        dtype: torch.dtype,
        settings: SchedulerSettings,
        hooks: CellHooks,
    ) -> None:
        self.index, self.link = index, link
        self.state = WorkerState.JOINING
        self.info: AttentionInfo | None = None
        self.scheduler: Scheduler
        self._config, self._dtype, self._settings, self._hooks = config, dtype, settings, hooks
        self._work = asyncio.Event()
        self._ready = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def connect(self) -> None:
        """Asks the worker what it is and makes an empty ledger for its pages.

        Raises Unavailable when it cannot be reached yet, ConfigError when it serves another model.
        """
        info = await asyncio.wait_for(self.link.describe(), TIMEOUTS.connect)
        who = f"attention worker {self.index} at {self.link.address}"
        if info.config_hash != self._config.content_hash:
            raise ConfigError(
                f"{who} serves another model: config hash {info.config_hash}, expected {self._config.content_hash}"
            )
        if info.dtype != self._dtype:
            raise ConfigError(f"{who} computes in {info.dtype}, expected {self._dtype}")
        if (info.layer_begin, info.layer_end) != (0, self._config.num_layers):
            raise ConfigError(f"{who} holds layers {info.layer_begin}-{info.layer_end - 1}, not all of them")
        self._adopt(info)

    def _adopt(self, info: AttentionInfo) -> None:
        """Starts anew with empty pages; sequences that waited for the worker's return go on waiting for a step."""
        waiting = self.scheduler.drain_all() if self.info is not None else []
        limit = min(self._settings.max_step_tokens, info.max_step_tokens)
        settings = dataclasses.replace(self._settings, max_step_tokens=limit)
        self.scheduler = Scheduler(settings, PageLedger(info.num_pages, info.page_size))
        self.info, self.state = info, WorkerState.READY
        self._hooks.rehome(self, waiting)
        self._ready.set()
        self._work.set()

    def start(self) -> None:
        """Starts the lanes."""
        self._tasks = [
            asyncio.create_task(self._run_lane(lane), name=f"cell-{self.index}-lane-{lane}")
            for lane in range(self._settings.num_lanes)
        ]
        for task in self._tasks:
            task.add_done_callback(_lane_ended)

    def check(self, request: Request) -> None:
        """Raises InvalidRequest when the request could never be served here."""
        self.scheduler.check_fits(request)

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence. Raises InvalidRequest when it could never be served here."""
        self.scheduler.add(sequence)
        self._work.set()

    def cancel(self, sequence: Sequence) -> None:
        """Forgets a sequence; its pages come free within a step."""
        self.scheduler.cancel(sequence)
        self._work.set()

    @property
    def load(self) -> int:
        """Sequences here, running and waiting."""
        return self.scheduler.num_running + self.scheduler.num_waiting

    async def close(self) -> None:
        """Ends the lanes and the link."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.link.close()

    async def _run_lane(self, lane: int) -> None:
        while True:
            await self._ready.wait()
            step = self.scheduler.schedule()
            if step is None:
                self._work.clear()
                await self._work.wait()
                continue
            await self._run_step(lane, step)
            self._work.set()

    async def _run_step(self, lane: int, step: Step) -> None:
        scheduler, info, legs = self.scheduler, self.info, Legs()
        assert info is not None
        for chunk in step.chunks:
            generation = self._hooks.generation_of(chunk.sequence)
            if generation is not None:
                generation.note_scheduled()
        plan = write_plan(step, info.incarnation)
        begin = time.perf_counter()
        try:
            result = await self.link.step(lane, plan, self._hooks.make_hole(lane, legs), legs)
            num_wanted = sum(chunk.wants_token for chunk in step.chunks)
            if len(result.token_ids) != num_wanted:
                raise InternalError(f"the attention worker drew {len(result.token_ids)} tokens, {num_wanted} were due")
        except ExpertsUnavailable as error:
            self._fail_requests(scheduler, step, error)
        except (Unavailable, FailedPrecondition) as error:
            scheduler.fail(step)
            self._lose(info, error)
        except Exception as error:
            logger.exception("step failed")
            self._fail_requests(scheduler, step, InternalError(f"a step failed: {type(error).__name__}: {error}"))
        else:
            self._deliver(scheduler, step, plan, result)
            self._hooks.step_done(self, step, time.perf_counter() - begin, legs)

    def _deliver(self, scheduler: Scheduler, step: Step, plan: StepPlan, result: StepResult) -> None:
        logprobs = {}
        for extra in read_extras(step, plan, result):
            sequence = extra.chunk.sequence
            generation = self._hooks.generation_of(sequence)
            if generation is None:
                continue
            if extra.logits is not None:
                generation.put_logits(extra.chunk.start, extra.logits)
            if extra.prompt_logprobs is not None:
                generation.put_prompt_logprobs(extra.chunk.start, extra.prompt_logprobs)
            if extra.logprobs is not None:
                logprobs[sequence] = extra.logprobs
        for drawn in scheduler.complete(step, result.token_ids):
            generation = self._hooks.generation_of(drawn.sequence)
            if generation is not None:
                generation.put(drawn, logprobs.get(drawn.sequence))
                if drawn.finish_reason is not None:
                    self._hooks.ended(drawn.sequence)

    def _fail_requests(self, scheduler: Scheduler, step: Step, error: GrokmoeError) -> None:
        """Ends the requests of a step that cannot be done; all others go on."""
        if not scheduler.fail(step):
            return
        for chunk in step.chunks:
            scheduler.cancel(chunk.sequence)
            generation = self._hooks.generation_of(chunk.sequence)
            if generation is not None:
                generation.fail(error)
                self._hooks.ended(chunk.sequence)

    def _lose(self, info: AttentionInfo, error: GrokmoeError) -> None:
        """The worker is gone, or is another incarnation: its pages are. Only the first lane to notice acts."""
        if info is not self.info or self.state is not WorkerState.READY:
            return
        logger.warning("attention worker %d at %s is lost: %s", self.index, self.link.address, error.message)
        self.state = WorkerState.SUSPECT
        self._ready.clear()
        self._hooks.rehome(self, self.scheduler.drain_all())
        self._tasks.append(asyncio.create_task(self._come_back()))

    async def _come_back(self) -> None:
        while True:
            await asyncio.sleep(PROBE_INTERVAL)
            try:
                await self.connect()
            except (GrokmoeError, TimeoutError) as error:
                # Another model at the same address is no passing trouble: somebody has to act.
                level = logging.WARNING if isinstance(error, ConfigError) else logging.DEBUG
                logger.log(level, "attention worker %d still away: %s", self.index, error)
                continue
            logger.info("attention worker %d at %s is back", self.index, self.link.address)
            return


def _lane_ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("%s has died of a bug, its requests hang", task.get_name(), exc_info=error)
