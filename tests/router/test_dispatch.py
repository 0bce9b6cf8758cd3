"""Rows to experts and back: whatever the routing, combine undoes gather, and who computed a row does not show."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from router import dispatch
from router.dispatch import DispatchPlan, Shard

WIDTH = 3


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """(expert ids [T, K], weights [T, K], rows [T, D], number of experts): distinct experts for each token."""
    num_experts = draw(st.integers(1, 6))
    num_ranks = draw(st.integers(1, num_experts))
    num_tokens = draw(st.integers(0, 7))
    some = draw(st.lists(st.integers(0, num_experts - 1), min_size=num_ranks, max_size=num_experts, unique=True))
    choices = [draw(st.permutations(some))[:num_ranks] for _ in range(num_tokens)]
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weights_TK = torch.rand(num_tokens, num_ranks, generator=random)
    x_TD = torch.randn(num_tokens, WIDTH, generator=random)
    return torch.tensor(choices, dtype=torch.int64).reshape(num_tokens, num_ranks), weights_TK, x_TD, num_experts


def assignments(num_experts: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 4), min_size=num_experts, max_size=num_experts)


def experts(plan: DispatchPlan, rows_ND: torch.Tensor) -> torch.Tensor:
    """Every expert does something of its own, so that a row at the wrong expert shows."""
    out_ND = torch.full_like(rows_ND, float("nan"))
    for shard in plan.shards:
        begin = shard.begin
        for expert, count in zip(shard.expert_ids, shard.counts, strict=True):
            out_ND[begin : begin + count] = rows_ND[begin : begin + count] * (expert + 1) + expert
            begin += count
    return out_ND


def expected(expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
    y_TD = torch.zeros(x_TD.shape)
    for token, ids in enumerate(expert_ids_TK.tolist()):
        for rank, expert in enumerate(ids):
            y_TD[token].addcmul_(x_TD[token] * (expert + 1) + expert, weights_TK[token, rank])
    return y_TD


@given(routings(), st.data())
def test_combine_undoes_gather(
    routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], data: st.DataObject
) -> None:
    expert_ids_TK, weights_TK, x_TD, num_experts = routing
    worker_of_expert = data.draw(assignments(num_experts))
    plan = dispatch.plan(expert_ids_TK, weights_TK, worker_of_expert)
    rows_ND = dispatch.gather(plan, x_TD)
    assert rows_ND.shape == (expert_ids_TK.numel(), WIDTH)
    identity_TD = (x_TD[:, None] * weights_TK[..., None]).sum(1)
    torch.testing.assert_close(dispatch.combine(plan, rows_ND), identity_TD)
    y_TD = dispatch.combine(plan, experts(plan, rows_ND))
    torch.testing.assert_close(y_TD, expected(expert_ids_TK, weights_TK, x_TD))


@given(routings(), st.data())
def test_shards_are_contiguous_and_sorted(
    routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], data: st.DataObject
) -> None:
    expert_ids_TK, weights_TK, _, num_experts = routing
    worker_of_expert = data.draw(assignments(num_experts))
    shards = dispatch.plan(expert_ids_TK, weights_TK, worker_of_expert).shards
    ends = [0, *(shard.end for shard in shards)]
    assert [shard.begin for shard in shards] == ends[:-1]
    assert ends[-1] == expert_ids_TK.numel()
    workers = [shard.worker for shard in shards]
    assert workers == sorted(set(workers)), "one shard per worker"
    for shard in shards:
        assert list(shard.expert_ids) == sorted(set(shard.expert_ids))
        assert sum(shard.counts) == shard.end - shard.begin
        for expert, count in zip(shard.expert_ids, shard.counts, strict=True):
            assert worker_of_expert[expert] == shard.worker
            assert count == (expert_ids_TK == expert).sum() > 0


@given(routings(), st.data())
def test_the_result_does_not_depend_on_who_computes(
    routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], data: st.DataObject
) -> None:
    expert_ids_TK, weights_TK, x_TD, num_experts = routing
    results = []
    for _ in range(2):
        plan = dispatch.plan(expert_ids_TK, weights_TK, data.draw(assignments(num_experts)))
        results.append(dispatch.combine(plan, experts(plan, dispatch.gather(plan, x_TD))))
    assert torch.equal(*results), "bit for bit"


@given(routings(), st.data())
def test_a_failed_shard_goes_to_others(
    routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], data: st.DataObject
) -> None:
    expert_ids_TK, weights_TK, _, num_experts = routing
    plan = dispatch.plan(expert_ids_TK, weights_TK, data.draw(assignments(num_experts)))
    others = data.draw(assignments(num_experts))
    for shard in plan.shards:
        parts = dispatch.reassign(shard, others)
        assert [part.begin for part in parts] == [shard.begin, *(part.end for part in parts[:-1])]
        assert parts[-1].end == shard.end
        assert sum((part.expert_ids for part in parts), ()) == shard.expert_ids, "the rows stay where they are"
        assert sum((part.counts for part in parts), ()) == shard.counts
        for part in parts:
            assert {others[expert] for expert in part.expert_ids} == {part.worker}
            assert sum(part.counts) == part.end - part.begin


def test_all_tokens_to_one_expert() -> None:
    plan = dispatch.plan(torch.full((5, 1), 2), torch.ones(5, 1), [0, 1, 2, 3])
    assert plan.shards == (Shard(2, (2,), (5,), 0, 5),)


def test_no_tokens() -> None:
    plan = dispatch.plan(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), [1, 0])
    assert plan.shards == ()
    rows_ND = dispatch.gather(plan, torch.empty(0, WIDTH))
    assert dispatch.combine(plan, rows_ND).shape == (0, WIDTH)


def test_the_rows_type_is_kept_and_the_sum_is_float32() -> None:
    plan = dispatch.plan(torch.tensor([[0, 1, 2]]), torch.ones(1, 3), [0, 0, 0])
    y_TD = dispatch.combine(plan, torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16))
    assert y_TD.dtype == torch.bfloat16
    assert y_TD.item() == 258.0, "in bfloat16 256 + 1 is 256, twice"
