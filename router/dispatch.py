"""Rows to experts and back: `plan`, `gather` and `combine`, which undo one another.

One stable sort orders the rows by (worker, expert), so what goes to a worker is one contiguous block and within it
each expert's rows are one block, too. The plan is opaque to everyone else; only `combine` reads its permutation.

The sum over a token's experts is taken here, in float32, in the order of the ranks. So the result does not depend on
placement, replicas, retries or the order in which answers arrive.

Letters: T tokens, K experts per token, N = T * K rows, D hidden, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from router import row_loops


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """The rows of one worker: `begin` to `end` of the gathered rows, sorted by expert.

    expert_ids ascend; counts are at least one and sum to end - begin.
    """

    worker: int
    expert_ids: tuple[int, ...]
    counts: tuple[int, ...]
    begin: int
    end: int


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


def plan(expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, worker_of_expert: Sequence[int]) -> DispatchPlan:
    """Sorts the rows by (worker, expert).

    worker_of_expert: the worker chosen for each expert in this call.
    """
    num_experts = len(worker_of_expert)
    by_worker = sorted(range(num_experts), key=lambda expert: (worker_of_expert[expert], expert))
    slot_of_expert = [0] * num_experts
    for slot, expert in enumerate(by_worker):
        slot_of_expert[expert] = slot
    order, counts_E = sort(expert_ids_TK, weights_TK, torch.tensor(slot_of_expert))
    shards = _shards(by_worker, counts_E.tolist(), worker_of_expert)
    return DispatchPlan(order.token_of_row_N, order.row_of_rank_TK, order.weights_TK, shards)


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


def _shards(by_worker: list[int], counts: list[int], worker_of_expert: Sequence[int]) -> tuple[Shard, ...]:
    shards: list[Shard] = []
    expert_ids: list[int] = []
    shard_counts: list[int] = []
    begin = end = 0
    for slot, expert in enumerate(by_worker):
        if counts[slot]:
            expert_ids.append(expert)
            shard_counts.append(counts[slot])
            end += counts[slot]
        worker = worker_of_expert[expert]
        last = slot + 1 == len(by_worker) or worker_of_expert[by_worker[slot + 1]] != worker
        if last and expert_ids:
            shards.append(Shard(worker, tuple(expert_ids), tuple(shard_counts), begin, end))
            expert_ids, shard_counts, begin = [], [], end
    return tuple(shards)


def reassign(shard: Shard, worker_of_expert: Sequence[int]) -> tuple[Shard, ...]:
    """Cuts a shard whose worker failed into shards for other workers.

    worker_of_expert: the new choice, for all experts. The rows stay where they are.
    """
    shards: list[Shard] = []
    begin = shard.begin
    for expert, count in zip(shard.expert_ids, shard.counts, strict=True):
        worker, end = worker_of_expert[expert], begin + count
        if shards and shards[-1].worker == worker:
            last = shards.pop()
            shards.append(Shard(worker, (*last.expert_ids, expert), (*last.counts, count), last.begin, end))
        else:
            shards.append(Shard(worker, (expert,), (count,), begin, end))
        begin = end
    return tuple(shards)


def gather(order: RowOrder, x_TD: torch.Tensor) -> torch.Tensor:
    """Copies every token's row once per chosen expert, in order. Returns rows_ND."""
    num_rows, (num_tokens, width) = len(order.token_of_row_N), x_TD.shape
    rows_ND = torch.empty(num_rows, width, dtype=x_TD.dtype)
    row_loops.gather(x_TD.dtype, num_rows, num_tokens, width, x_TD.contiguous(), order.token_of_row_N, rows_ND)
    return rows_ND


def combine(order: RowOrder, rows_ND: torch.Tensor) -> torch.Tensor:
    """Weights and sums the experts' rows of every token, rank by rank, in float32.

    rows_ND: one output row per gathered row, in the same order. Returns y_TD in the rows' type.
    """
    num_tokens, num_ranks = order.row_of_rank_TK.shape
    y_TD = torch.empty(num_tokens, rows_ND.shape[1], dtype=rows_ND.dtype)
    row_loops.combine(
        rows_ND.dtype, num_tokens, num_ranks, rows_ND.shape[1],
        rows_ND.contiguous(), y_TD, order.row_of_rank_TK, order.weights_TK.contiguous(),
    )  # fmt: skip
    return y_TD
