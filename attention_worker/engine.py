"""Runs plans: validates, builds the batch, drives the model's forward from hole to hole, samples.

Knows nothing of the wire. Whatever computes here runs on the caller's thread, which is the device thread.

Letters: T tokens of the step, D hidden, R rows of logits, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

import torch

from attention_worker.kv_cache import KVCache
from attention_worker.lease import new_incarnation
from attention_worker.logit_rows import LogitRows
from attention_worker.lora.step import StepAdapters, step_adapters
from attention_worker.lora.store import AdapterStore
from attention_worker.model import Forward, Model
from attention_worker.plan_check import PlanCheck, no_adapter
from attention_worker.recorded_steps import Fill, RecordedSteps, can_be_recorded
from attention_worker.sharding import WHOLE, Sharding, most_kv_heads
from attention_worker.stages import StageClock, no_time
from attention_worker.step_batch import StepBatch
from attention_worker.step_end import end_step
from attention_worker.weights import AttentionWeights
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import InvalidRequest
from grokmoe.model_config import ModelConfig
from grokmoe.step_plan import SequenceChunk, StepPlan, StepResult, TokenSampling
from grokmoe.telemetry import AttentionMetrics

logger = logging.getLogger(__name__)


WARM_TOKENS = (1, 2, 4, 8, 32)
"""Lengths of the steps that warm up: rows computed apart, and a chunk that is long enough for matrix products."""


@dataclasses.dataclass(frozen=True)
class AttentionEngineSettings:
    """Sizes of the KV cache and of a step."""

    num_pages: int
    page_size: int
    max_step_tokens: int
    enforce_eager: bool = False
    """Whether decode steps are never programs, see `recorded_steps`."""


@dataclasses.dataclass(frozen=True, slots=True)
class MoeInput:
    """A step has reached the hole of `layer` with x_TD."""

    layer: int
    x_TD: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _StepRecording:
    """A step that could be a program, as a batch, and all programs."""

    steps: RecordedSteps
    batch: StepBatch


class StepRun:
    """One step under way. `advance` goes to the next hole or to the end; a run that is dropped changes nothing more.

    stages_ns: nanoseconds that it has computed so far, by stage.
    """

    def __init__(
        self,
        forward: Forward,
        plan: StepPlan,
        rows: LogitRows | None,
        adapters: StepAdapters | None,
        first_layer: int,
        metrics: AttentionMetrics,
        clock: StageClock,
        recording: _StepRecording | None = None,
    ) -> None:
        """rows: what the logits are of; None: the forward ends with the residual. adapters: None: no chunk has one.
        recording: None: a step that is not to be recorded."""
        self._recording = recording
        self._forward, self._plan, self._rows, self._metrics = forward, plan, rows, metrics
        self._vocab_sizes_C = adapters.vocab_sizes_C if adapters is not None and adapters.adds_tokens else None
        self._clock, self.stages_ns = clock, no_time()
        self._layer = first_layer - 1
        self._x_TD: torch.Tensor | None = None
        self._is_trial = False
        self._expected: tuple[torch.Size, torch.dtype] | None = None

    @torch.inference_mode()
    def advance(self, moe_TD: torch.Tensor | None) -> MoeInput | StepResult:
        """Computes up to the next hole. moe_TD: the MoE output of the last one, None to begin.

        Raises InvalidRequest, with the run still usable, when the output has not the shape and type of the input.
        """
        if moe_TD is not None and (moe_TD.shape, moe_TD.dtype) != self._expected:
            raise InvalidRequest(
                "payload", f"MoE output is {moe_TD.dtype} {list(moe_TD.shape)}, expected {self._expected}"
            )
        begin = time.perf_counter()
        self._clock.begin(self.stages_ns)
        try:
            x_TD = self._forward.send(moe_TD)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as end:
            return self._finish(end.value)
        finally:
            self._metrics.compute_time.observe(time.perf_counter() - begin)
        self._layer += 1
        self._x_TD, self._expected = x_TD, (x_TD.shape, x_TD.dtype)
        return MoeInput(self._layer, x_TD)

    @torch.inference_mode()
    def replay(self, fill: Fill) -> StepResult | None:
        """Computes the step whole if there is a program for it; else it is to be advanced, and may become one.

        fill: records the MoE of a layer.
        """
        if self._recording is None:
            return None
        begin = time.perf_counter()
        computed = self._recording.steps.run(self._recording.batch)
        if computed is None:
            self._recording.steps.try_out(self._recording.batch, fill)
            self._is_trial = True
            return None
        self._clock.begin(self.stages_ns)
        self.stages_ns |= computed.spent_ns
        self._x_TD = computed.x_TD
        result = self._finish(computed.logits_TV)
        self._metrics.compute_time.observe(time.perf_counter() - begin)
        return result

    @property
    def incarnation(self) -> str:
        """The one whose pages the step uses."""
        return self._plan.incarnation

    def _finish(self, last: torch.Tensor) -> StepResult:
        """last: what the forward has returned."""
        chunks = self._plan.chunks
        assert self._x_TD is not None
        result = end_step(chunks, self._rows, self._x_TD, last, self._vocab_sizes_C)
        if result.faulty_chunks:
            logger.error("%d of %d chunks of a step are not finite", len(result.faulty_chunks), len(chunks))
        self._clock.lap("sample")
        if self._is_trial and not result.faulty_chunks:  # NaN is not equal to itself
            assert self._recording is not None
            self._recording.steps.judge(last)
        self._metrics.steps.labels("ok").inc()
        self._metrics.tokens.inc(sum(len(chunk.token_ids) for chunk in chunks))
        return result

    def close(self) -> None:
        """Drops the step and the memory it holds."""
        self._forward.close()


Lead = Callable[[StepPlan, Forward], Forward]
"""Gives the same forward back, computed by all ranks of the worker as this one computes it."""


def _alone(plan: StepPlan, forward: Forward) -> Forward:
    return forward


class AttentionEngine:
    """One attention worker's model, cache and device thread, or those of one of its ranks.

    held: the numbers of the layers that it computes. num_ranks: that each of them is shared out among. recorded:
    programs of decode steps, if there can be any.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: AttentionWeights,
        settings: AttentionEngineSettings,
        metrics: AttentionMetrics,
        device: DeviceThread,
        sharding: Sharding = WHOLE,
        lead: Lead = _alone,
        adapters: AdapterStore | None = None,
    ) -> None:
        """sharding: for more than one rank; lead: for the first of them. adapters: those that plans may name; None:
        there will be none."""
        self.config, self.settings, self.device = config, settings, device
        self.num_ranks = weights.shard.size
        self.dtype, self.torch_device, self.held = weights.dtype, weights.device, weights.held
        self.metrics = metrics
        self.cache = KVCache(
            len(self.held),
            settings.num_pages,
            settings.page_size,
            len(weights.shard.kv_heads),
            config.head_dim,
            self.dtype,
            self.torch_device,
        )
        metrics.kv_bytes.set(self.cache.bytes)
        metrics.queue.set_function(lambda: device.num_waiting)
        self._model, self._lead = Model(config, weights, self.cache, sharding), lead
        self.recorded: RecordedSteps | None = None
        if self._model.can_be_recorded and not settings.enforce_eager:
            max_pages = -(-config.context_length // settings.page_size)
            self.recorded = RecordedSteps(self._model, max_pages, self.held.start)
        self.adapters = adapters
        self._check = PlanCheck(
            config,
            self.held,
            new_incarnation(),
            settings.num_pages,
            settings.page_size,
            settings.max_step_tokens,
            no_adapter if adapters is None else lambda id_: adapters.find(id_).info.num_added_tokens,
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Computes steps that nobody asked for, before the first one that somebody does: loops are compiled or found in
        their cache, and libraries build what they build once. Leaves its traces in pages that nobody has."""
        page_size = self.settings.page_size
        for num_tokens in WARM_TOKENS:
            num_tokens = min(num_tokens, self.settings.max_step_tokens, self.settings.num_pages * page_size)
            pages = tuple(range(-(-num_tokens // page_size)))
            self._warm_up_with((SequenceChunk((0,) * num_tokens, 0, pages, TokenSampling()),))

    def _warm_up_with(self, chunks: tuple[SequenceChunk, ...]) -> None:
        rows = self._logit_rows(chunks)
        hidden_TD = None
        if self.held.start:
            hidden_TD = torch.zeros(sum(len(chunk.token_ids) for chunk in chunks), self.config.hidden_size)
        plan = StepPlan(self.incarnation, chunks, hidden_TD)
        forward = self._lead(plan, self._forward(plan, self._batch(plan), rows, None))
        x_TD = next(forward)
        try:
            while True:
                x_TD = forward.send(x_TD)
        except StopIteration as end:
            end_step(chunks, rows, x_TD, end.value)

    @property
    def incarnation(self) -> str:
        """Names the pages as they are now."""
        return self._check.incarnation

    def change_incarnation(self, incarnation: str) -> None:
        """The pages go to another holder: plans and steps of the last one are refused from now on."""
        self._check.incarnation = incarnation

    def check_incarnation(self, run: StepRun) -> None:
        """Raises FailedPrecondition when the pages have gone to another holder since the step began."""
        self._check.check_incarnation(run.incarnation)

    def begin(self, plan: StepPlan) -> StepRun:
        """Validates a plan and prepares its step; computes nothing yet.

        Raises InvalidRequest or FailedPrecondition, with the cache as it was.
        """
        try:
            self._check.check(plan)
        except Exception:
            self.metrics.steps.labels("refused").inc()
            raise
        rows, batch = self._logit_rows(plan.chunks), self._batch(plan)
        adapters = self._adapters_of(plan.chunks, rows)
        forward = self._lead(plan, self._forward(plan, batch, rows, adapters))
        recording = None
        # Which rows have which adapter changes from step to step: a step with any is computed loop by loop.
        if self.recorded is not None and adapters is None and can_be_recorded(plan.chunks):
            batch.check_pages(self.settings.num_pages)
            recording = _StepRecording(self.recorded, batch)
        return StepRun(forward, plan, rows, adapters, self.held.start, self.metrics, self._model.clock, recording)

    def _logit_rows(self, chunks: Sequence[SequenceChunk]) -> LogitRows | None:
        """None where the head is another stage's, and with it whatever is asked for of the logits."""
        return LogitRows.of(chunks) if self.held.stop == self.config.num_layers else None

    def forward(self, plan: StepPlan) -> Forward:
        """This rank's part of a step whose plan another one has validated."""
        rows = self._logit_rows(plan.chunks)
        return self._forward(plan, self._batch(plan), rows, self._adapters_of(plan.chunks, rows))

    def _batch(self, plan: StepPlan) -> StepBatch:
        return StepBatch.build(plan.chunks, self.settings.page_size)

    def _adapters_of(self, chunks: Sequence[SequenceChunk], rows: LogitRows | None) -> StepAdapters | None:
        store = self.adapters
        if store is None or not any(chunk.adapter for chunk in chunks):
            return None
        adapters_C = [store.find(chunk.adapter) if chunk.adapter else None for chunk in chunks]
        return step_adapters(chunks, adapters_C, () if rows is None else rows.step_rows_R, self.config.vocab_size)

    def _forward(
        self, plan: StepPlan, batch: StepBatch, rows: LogitRows | None, adapters: StepAdapters | None
    ) -> Forward:
        step_rows_R = torch.tensor(() if rows is None else rows.step_rows_R, dtype=torch.int64)
        return self._model.forward(batch, step_rows_R, plan.hidden_state, adapters)


def num_pages_in(
    config: ModelConfig, num_layers: int, dtype: torch.dtype, page_size: int, gib: float, num_ranks: int = 1
) -> int:
    """KV pages of so many layers in `gib` GiB of each rank; at least one sequence of full context, as fewer could serve
    none."""
    kv_size = most_kv_heads(config, num_ranks) * config.head_dim
    page_bytes = 2 * num_layers * kv_size * page_size * dtype.itemsize
    return max(int(gib * 2**30) // page_bytes, -(-config.context_length // page_size))
