"""Runs plans: validates, builds the batch, drives the model's forward from hole to hole, samples.

Knows nothing of the wire. Whatever computes here runs on the caller's thread, which is the device thread.

Letters: T tokens of the step, D hidden, R rows of logits, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import time
import uuid

import torch

from attention_worker.kv_cache import KVCache
from attention_worker.logit_rows import LogitRows
from attention_worker.model import Forward, Model
from attention_worker.plan_check import PlanCheck
from attention_worker.step_batch import StepBatch
from attention_worker.step_output import step_result
from attention_worker.weights import AttentionWeights
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import InvalidRequest
from grokmoe.model_config import ModelConfig
from grokmoe.step_plan import StepPlan, StepResult
from grokmoe.telemetry import AttentionMetrics


@dataclasses.dataclass(frozen=True)
class AttentionEngineSettings:
    """Sizes of the KV cache and of a step."""

    num_pages: int
    page_size: int
    max_step_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class MoeInput:
    """A step has reached the hole of `layer` with x_TD."""

    layer: int
    x_TD: torch.Tensor


class StepRun:
    """One step under way. `advance` goes to the next hole or to the end; a run that is dropped changes nothing more."""

    def __init__(self, forward: Forward, plan: StepPlan, rows: LogitRows, metrics: AttentionMetrics) -> None:
        self._forward, self._plan, self._rows, self._metrics = forward, plan, rows, metrics
        self._layer = -1
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
        try:
            x_TD = self._forward.send(moe_TD)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as end:
            return self._finish(end.value)
        finally:
            self._metrics.compute_time.observe(time.perf_counter() - begin)
        self._layer += 1
        self._expected = (x_TD.shape, x_TD.dtype)
        return MoeInput(self._layer, x_TD)

    def _finish(self, logits_RV: torch.Tensor) -> StepResult:
        result = step_result(self._plan.chunks, self._rows, logits_RV)
        self._metrics.steps.labels("ok").inc()
        self._metrics.tokens.inc(sum(len(chunk.token_ids) for chunk in self._plan.chunks))
        return result

    def close(self) -> None:
        """Drops the step and the memory it holds."""
        self._forward.close()


class AttentionEngine:
    """One attention worker's model, cache and device thread."""

    def __init__(
        self,
        config: ModelConfig,
        weights: AttentionWeights,
        settings: AttentionEngineSettings,
        metrics: AttentionMetrics,
        device: DeviceThread,
    ) -> None:
        self.config, self.settings, self.device = config, settings, device
        self.dtype = weights.embedding_VD.dtype
        self.torch_device = weights.embedding_VD.device
        self.incarnation = uuid.uuid4().hex
        self.metrics = metrics
        self._cache = KVCache(
            config.num_layers,
            settings.num_pages,
            settings.page_size,
            config.num_kv_heads,
            config.head_dim,
            self.dtype,
            self.torch_device,
        )
        metrics.kv_bytes.set(self._cache.bytes)
        metrics.queue.set_function(lambda: device.num_waiting)
        self._model = Model(config, weights, self._cache)
        self._check = PlanCheck(
            config, self.incarnation, settings.num_pages, settings.page_size, settings.max_step_tokens
        )

    def begin(self, plan: StepPlan) -> StepRun:
        """Validates a plan and prepares its step; computes nothing yet.

        Raises InvalidRequest or FailedPrecondition, with the cache as it was.
        """
        try:
            self._check.check(plan)
        except Exception:
            self.metrics.steps.labels("refused").inc()
            raise
        batch = StepBatch.build(plan.chunks, self.settings.page_size)
        rows = LogitRows.of(plan.chunks)
        forward = self._model.forward(batch, torch.tensor(rows.step_rows_R, dtype=torch.int64))
        return StepRun(forward, plan, rows, self.metrics)


def num_pages_in(config: ModelConfig, dtype: torch.dtype, page_size: int, gib: float) -> int:
    """KV pages that fit into `gib` GiB; at least one sequence of full context, as a smaller cache could serve none."""
    page_bytes = 2 * config.num_layers * config.kv_size * page_size * dtype.itemsize
    return max(int(gib * 2**30) // page_bytes, -(-config.context_length // page_size))
