"""Rows to experts and back: `plan`, `gather` and `combine`, which undo one another.

One stable sort orders the rows by (worker, expert), so what goes to a worker is one contiguous block and within it
each expert's rows are one block, too. The plan is opaque to everyone else; only `combine` reads its permutation.

Experts are units here (`grokmoe.expert_units`): where one is cut into slices, a token that goes to it goes to each of
them, with the same weight.

The sum over a token's experts is taken here, in float32, in the order of the ranks and, within one, of the slices. So
the result does not depend on placement, replicas, retries or the order in which answers arrive.

Letters: T tokens, K experts per token, D hidden, E experts, S most slices of an expert; N rows, T * K without slices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from grokmoe.expert_units import FIRST_SLICE, num_slices_of, slice_of
from router import row_loops


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """The rows of one worker: `begin` to `end` of the gathered rows, sorted by expert.

    expert_ids: units, ascending. counts: of each, at least one; they sum to end - begin.
    """

    worker: int
    expert_ids: tuple[int, ...]
    counts: tuple[int, ...]
    begin: int
    end: int

    @property
    def work(self) -> float:
        """Its rows, those for a slice counted as their part of one."""
        if self.expert_ids[-1] < FIRST_SLICE:
            return self.end - self.begin
        return sum(count / num_slices_of(unit) for unit, count in zip(self.expert_ids, self.counts, strict=True))


@dataclasses.dataclass(frozen=True, slots=True)
class RowOrder:
    """Where every row comes from, and how to undo it: for `gather` and `combine` only."""

    token_of_row_N: torch.Tensor
    row_of_rank_TK: torch.Tensor
    weights_TK: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class DispatchPlan(RowOrder):
    """The same, and where every row goes."""

    shards: tuple[Shard, ...]


def plan(expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, workers: Mapping[int, int]) -> DispatchPlan:
    """Sorts the rows by (worker, unit).

    workers: the worker chosen for each unit of the layer in this call; of every expert all slices are there.
    """
    by_worker = sorted(workers, key=lambda unit: (workers[unit], unit))
    num_units, has_slices = len(by_worker), max(workers) >= FIRST_SLICE
    if has_slices:
        expert_ids_TK, weights_TK = _to_slices(expert_ids_TK, weights_TK, by_worker)
        slot_of_expert = list(range(num_units))
    else:
        slot_of_expert = [0] * num_units
        for slot, expert in enumerate(by_worker):
            slot_of_expert[expert] = slot
    order, counts_E = sort(expert_ids_TK, weights_TK, torch.tensor(slot_of_expert))
    shards = _shards(by_worker, counts_E.tolist(), workers)
    token_of_row_N = order.token_of_row_N
    if has_slices:  # not every expert has S
        token_of_row_N = token_of_row_N[: shards[-1].end if shards else 0]
    return DispatchPlan(token_of_row_N, order.row_of_rank_TK, order.weights_TK, shards)


def sort(expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, slot_E: torch.Tensor) -> tuple[RowOrder, torch.Tensor]:
    """The rows in the order of their experts' slots, and counts_E by slot. Loops alone: it may be recorded.

    slot_E: int64, a permutation.
    """
    num_tokens, num_ranks = expert_ids_TK.shape
    token_of_row_N = torch.empty(num_tokens * num_ranks, dtype=torch.int64)
    row_of_rank_TK = torch.empty(num_tokens, num_ranks, dtype=torch.int64)
    counts_E = torch.empty(len(slot_E), dtype=torch.int64)
    row_loops.plan(
        torch.float32, 1, num_tokens, num_ranks, len(slot_E),
        expert_ids_TK.contiguous(), slot_E, counts_E, token_of_row_N, row_of_rank_TK,
    )  # fmt: skip
    return RowOrder(token_of_row_N, row_of_rank_TK, weights_TK), counts_E


def _to_slices(
    expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, units: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank for every slice of every chosen expert, [T, K * S]: the place in `units` of the slice, and its weight.

    Where an expert has fewer slices than S, the last of its ranks are NO_SLICE.
    """
    slices = list(map(slice_of, units))
    num_experts = 1 + max(each.expert for each in slices)
    place_ES = [[row_loops.NO_SLICE] * max(each.num_slices for each in slices) for _ in range(num_experts)]
    for place, (expert, index, _) in enumerate(slices):
        place_ES[expert][index] = place
    return torch.tensor(place_ES)[expert_ids_TK].flatten(1), weights_TK.repeat_interleave(len(place_ES[0]), 1)


def _shards(by_worker: list[int], counts: list[int], workers: Mapping[int, int]) -> tuple[Shard, ...]:
    shards: list[Shard] = []
    expert_ids: list[int] = []
    shard_counts: list[int] = []
    begin = end = 0
    for slot, expert in enumerate(by_worker):
        if counts[slot]:
            expert_ids.append(expert)
            shard_counts.append(counts[slot])
            end += counts[slot]
        worker = workers[expert]
        last = slot + 1 == len(by_worker) or workers[by_worker[slot + 1]] != worker
        if last and expert_ids:
            shards.append(Shard(worker, tuple(expert_ids), tuple(shard_counts), begin, end))
            expert_ids, shard_counts, begin = [], [], end
    return tuple(shards)


def reassign(shard: Shard, workers: Mapping[int, int]) -> tuple[Shard, ...]:
    """Cuts a shard whose worker failed into shards for other workers.

    workers: the new choice. The rows stay where they are.
    """
    shards: list[Shard] = []
    begin = shard.begin
    for expert, count in zip(shard.expert_ids, shard.counts, strict=True):
        worker, end = workers[expert], begin + count
        if shards and shards[-1].worker == worker:
            last = shards.pop()
            shards.append(Shard(worker, (*last.expert_ids, expert), (*last.counts, count), last.begin, end))
        else:
            shards.append(Shard(worker, (expert,), (count,), begin, end))
        begin = end
    return tuple(shards)


def gather(order: RowOrder, x_TD: torch.Tensor) -> torch.Tensor:
    """Copies every token's row once per chosen expert or slice of it, in order. Returns rows_ND."""
    num_rows, (num_tokens, width) = len(order.token_of_row_N), x_TD.shape
    rows_ND = torch.empty(num_rows, width, dtype=x_TD.dtype)
    row_loops.gather(x_TD.dtype, num_rows, num_tokens, width, x_TD.contiguous(), order.token_of_row_N, rows_ND)
    return rows_ND


def combine(order: RowOrder, rows_ND: torch.Tensor) -> torch.Tensor:
    """Weights and sums the experts' rows of every token, rank by rank and slice by slice, in float32.

    rows_ND: one output row per gathered row, in the same order. Returns y_TD in the rows' type.
    """
    num_tokens, num_ranks = order.row_of_rank_TK.shape
    y_TD = torch.empty(num_tokens, rows_ND.shape[1], dtype=rows_ND.dtype)
    row_loops.combine(
        rows_ND.dtype, num_tokens, num_ranks, rows_ND.shape[1],
        rows_ND.contiguous(), y_TD, order.row_of_rank_TK, order.weights_TK.contiguous(),
    )  # fmt: skip
    return y_TD
