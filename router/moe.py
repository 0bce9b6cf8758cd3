"""The MoE of one layer: gate, plan, gather, send, combine. Fills the hole in an attention worker's forward.

Letters: T tokens, D hidden, E experts, N rows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from grokmoe.device_thread import DeviceThread
from grokmoe.errors import InternalError
from grokmoe.expert_units import FIRST_SLICE, expert_of, slice_of
from grokmoe.model_config import ModelConfig
from grokmoe.recording import current
from router import dispatch
from router.experts import ExpertPool, SlicingChanged
from router.experts.answers import RowsWithoutAnswer
from router.gating import gate
from router.legs import Legs
from router.placement import Choice

INLINE_ELEMENTS = 64 * 1024
"""MoE inputs up to this many elements are gated and combined on the event loop, larger ones on the compute thread:
below it a hand-over to another thread and back costs more than the work itself."""

MAX_PARTS = 32
"""Parts into which rows without an answer are split at a time, to find the ones at fault: a step of decodes is split
into single rows at once. Every round costs as much as workers that failed take to be back in use."""

LocalExperts = Callable[[int, tuple[int, ...], tuple[int, ...], torch.Tensor], torch.Tensor]
"""(layer, expert_ids, counts, rows_ND) -> rows_ND, on the caller's thread."""

RecordExperts = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, counts_E, rows_ND) -> rows_ND, while loops are recorded (`grokmoe.recording`)."""


@runtime_checkable
class RecordableExperts(Protocol):
    """LocalExperts that can also be called while loops are recorded."""

    record: RecordExperts


@dataclasses.dataclass(frozen=True)
class Gates:
    """The router's only weights: one matrix per layer, float32, [E, D]."""

    per_layer: tuple[torch.Tensor, ...]

    @classmethod
    def from_weights(cls, weights: Sequence[torch.Tensor]) -> Gates:
        """weights: per layer the checkpoint's [E, D]."""
        return cls(tuple(weight.float().contiguous() for weight in weights))


class RowCounter:
    """Rows per layer and expert since start, [L, E]."""

    def __init__(self, config: ModelConfig) -> None:
        self.rows_LE = [[0] * config.num_experts for _ in range(config.num_layers)]

    def add(self, layer: int, plan: dispatch.DispatchPlan) -> None:
        """Counts one call."""
        row = self.rows_LE[layer]
        for shard in plan.shards:
            for unit, count in zip(shard.expert_ids, shard.counts, strict=True):
                if unit < FIRST_SLICE:
                    row[unit] += count
                elif slice_of(unit).slice == 0:  # the same rows go to each
                    row[expert_of(unit)] += count

    def add_counts(self, layer: int, counts_E: Sequence[int]) -> None:
        """The same of a call whose rows were counted elsewhere."""
        row = self.rows_LE[layer]
        for expert, count in enumerate(counts_E):
            row[expert] += count

    def by_expert(self) -> list[int]:
        """Rows per expert, all layers."""
        return [sum(column) for column in zip(*self.rows_LE, strict=True)]


class RemoteMoe:
    """Fills holes with experts behind links. One instance per lane and step."""

    is_local = can_be_recorded = False

    def __init__(
        self,
        config: ModelConfig,
        gates: Gates,
        pool: ExpertPool,
        counter: RowCounter,
        compute: DeviceThread,
        lane: int,
        legs: Legs,
        deadline: float | None = None,
    ) -> None:
        """deadline: when nobody waits for the step any more, monotonic; None: the pool's own limits."""
        self._config, self._gates, self._pool, self._deadline = config, gates, pool, deadline
        self._counter, self._compute, self._lane, self._legs = counter, compute, lane, legs
        self.faulty_rows: set[int] = set()

    async def fill(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """MoE input -> MoE output. Raises ExpertsUnavailable when an expert that a row needs has no replica left.

        Rows for which the experts have no finite answer, wherever they are asked, come out as NaN and are kept in
        `faulty_rows`; the experts do not see them in later layers. InternalError when there is no other row.
        """
        if self.faulty_rows:
            x_TD = x_TD.index_fill(0, torch.tensor(sorted(self.faulty_rows)), 0.0)
        try:
            out_TD = await self._fill(layer, x_TD)
        except InternalError:
            out_TD = await self._fill_in_parts(layer, x_TD)
        if self.faulty_rows:
            if len(self.faulty_rows) == len(x_TD):
                raise InternalError("the experts have no answer for any row of this step")
            out_TD = out_TD.index_fill(0, torch.tensor(sorted(self.faulty_rows)), torch.nan)
        return out_TD

    async def _fill(self, layer: int, x_TD: torch.Tensor, first: int = 0) -> torch.Tensor:
        """first: the place of the first of these rows in the step.

        Workers are chosen before the gate says which experts are needed: that is one hand-over to the compute thread
        and not two. An expert without a worker costs nothing unless rows turn out to be for it."""
        inline, is_complete = x_TD.numel() <= INLINE_ELEMENTS, True
        while True:
            workers = self._pool.choose(layer)
            if inline:
                plan, rows_ND = self._scatter(layer, x_TD, workers)
            else:
                plan, rows_ND = await self._compute.run(self._scatter, layer, x_TD, workers)
            try:
                out_ND = await self._pool.forward(self._lane, layer, plan.shards, rows_ND, self._legs, self._deadline)
            except RowsWithoutAnswer as error:
                out_ND, is_complete = error.rows_ND, False
            except SlicingChanged:  # while some of the rows waited: from here on anew
                continue
            break
        self._counter.add(layer, plan)
        out_TD = self._combine(plan, out_ND) if inline else await self._compute.run(self._combine, plan, out_ND)
        if not is_complete:
            is_faulty_T = torch.isnan(out_TD).any(1) & torch.isfinite(x_TD).all(1)
            self.faulty_rows.update((first + is_faulty_T.nonzero().flatten()).tolist())
        return out_TD

    async def _fill_in_parts(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """Finds the rows at fault, which `_fill` has failed for: the same rows again, in ever smaller parts at a time.
        What is computed for a row does not depend on the others."""
        out_TD = torch.zeros_like(x_TD)
        suspects = [range(len(x_TD))]
        while suspects:
            parts = [
                part[begin : begin + size]
                for part in suspects
                if (size := math.ceil(len(part) / MAX_PARTS))
                for begin in range(0, len(part), size)
            ]
            tries = (self._fill(layer, x_TD[part.start : part.stop], part.start) for part in parts)
            outcomes = await asyncio.gather(*tries, return_exceptions=True)
            suspects = []
            for part, outcome in zip(parts, outcomes, strict=True):
                if isinstance(outcome, torch.Tensor):
                    out_TD[part.start : part.stop] = outcome
                elif not isinstance(outcome, InternalError):
                    raise outcome
                elif len(part) > 1:
                    suspects.append(part)
                else:
                    self.faulty_rows.add(part.start)
        return out_TD

    def fill_now(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """Never: the experts are elsewhere."""
        raise AssertionError("experts are remote")

    record = fill_now

    def _scatter(self, layer: int, x_TD: torch.Tensor, workers: Choice) -> tuple[dispatch.DispatchPlan, torch.Tensor]:
        with self._legs.time("gate"):
            weights_TK, expert_ids_TK = gate(x_TD, self._gates.per_layer[layer], self._config)
        with self._legs.time("dispatch"):
            plan = dispatch.plan(expert_ids_TK, weights_TK, workers)
            return plan, dispatch.gather(plan, x_TD)

    def _combine(self, plan: dispatch.DispatchPlan, out_ND: torch.Tensor) -> torch.Tensor:
        with self._legs.time("combine"):
            return dispatch.combine(plan, out_ND)


class LocalMoe:
    """Fills holes with experts in this process, on the thread that runs the attention."""

    is_local = True

    def __init__(
        self,
        config: ModelConfig,
        gates: Gates,
        experts: LocalExperts,
        counter: RowCounter,
        legs: Legs,
        record_experts: RecordExperts | None = None,
    ) -> None:
        """record_experts: None: holes are not filled while loops are recorded."""
        self._config, self._gates, self._experts, self._record_experts = config, gates, experts, record_experts
        self._counter, self._legs = counter, legs
        self._one_worker = dict.fromkeys(range(config.num_experts), 0)

    @property
    def can_be_recorded(self) -> bool:
        """Whether `record` can be used."""
        return self._record_experts is not None

    async def fill(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """Never: whoever has local experts calls `fill_now`."""
        raise AssertionError("experts are local")

    def fill_now(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """MoE input -> MoE output, on the caller's thread."""
        legs = self._legs
        with legs.time("gate"):
            weights_TK, expert_ids_TK = gate(x_TD, self._gates.per_layer[layer], self._config)
        with legs.time("dispatch"):
            plan = dispatch.plan(expert_ids_TK, weights_TK, self._one_worker)
            rows_ND = dispatch.gather(plan, x_TD)
        self._counter.add(layer, plan)
        if not plan.shards:
            return x_TD
        shard = plan.shards[0]
        with legs.time("expert"):
            out_ND = self._experts(layer, shard.expert_ids, shard.counts, rows_ND)
        with legs.time("combine"):
            return dispatch.combine(plan, out_ND)

    def record(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """`fill_now` while loops are recorded: experts and their rows are told apart by the loops themselves."""
        recording, counter = current(), self._counter
        assert recording is not None
        assert self._record_experts is not None
        weights_TK, expert_ids_TK = gate(x_TD, self._gates.per_layer[layer], self._config)
        recording.lap("gate")
        order, counts_E = dispatch.sort(expert_ids_TK, weights_TK, torch.arange(self._config.num_experts))
        rows_ND = dispatch.gather(order, x_TD)
        recording.lap("dispatch")
        recording.after.append(lambda spent_ns: counter.add_counts(layer, counts_E.tolist()))
        out_ND = self._record_experts(layer, counts_E, rows_ND)
        recording.lap("expert")
        y_TD = dispatch.combine(order, out_ND)
        recording.lap("combine")
        return y_TD
