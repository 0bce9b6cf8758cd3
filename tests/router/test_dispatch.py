"""Rows to experts and back: whatever the routing, combine undoes gather, and who computed a row does not show."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grokmoe.expert_units import expert_of, num_slices_of, slice_of, unit_of, units_of
from grokmoe.model_config import TINY
from router import dispatch
from router.dispatch import DispatchPlan, Shard
from router.moe import RowCounter

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


def assignments(num_experts: int) -> st.SearchStrategy[dict[int, int]]:
    """A worker for each expert."""
    workers = st.lists(st.integers(0, 4), min_size=num_experts, max_size=num_experts)
    return workers.map(lambda each: dict(enumerate(each)))


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
    plan = dispatch.plan(torch.full((5, 1), 2), torch.ones(5, 1), dict(enumerate(range(4))))
    assert plan.shards == (Shard(2, (2,), (5,), 0, 5),)


def test_no_tokens() -> None:
    plan = dispatch.plan(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), {0: 1, 1: 0})
    assert plan.shards == ()
    rows_ND = dispatch.gather(plan, torch.empty(0, WIDTH))
    assert dispatch.combine(plan, rows_ND).shape == (0, WIDTH)


def test_the_rows_type_is_kept_and_the_sum_is_float32() -> None:
    plan = dispatch.plan(torch.tensor([[0, 1, 2]]), torch.ones(1, 3), {0: 0, 1: 0, 2: 0})
    y_TD = dispatch.combine(plan, torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16))
    assert y_TD.dtype == torch.bfloat16
    assert y_TD.item() == 258.0, "in bfloat16 256 + 1 is 256, twice"


@st.composite
def cuts(draw: st.DrawFn, num_experts: int) -> list[int]:
    """Every expert whole, or in some number of slices of its own: all units, ascending."""
    numbers = [draw(st.sampled_from([1, 1, 2, 3, 4])) for _ in range(num_experts)]
    return sorted(unit for expert, number in enumerate(numbers) for unit in units_of(expert, number))


def slices(plan: DispatchPlan, rows_ND: torch.Tensor) -> torch.Tensor:
    """Every slice does something of its own: together what `experts` does, where it is whole."""
    out_ND = torch.full_like(rows_ND, float("nan"))
    for shard in plan.shards:
        begin = shard.begin
        for unit, count in zip(shard.expert_ids, shard.counts, strict=True):
            expert, index, number = slice_of(unit)
            part = (index + 1) / (number * (number + 1) / 2)
            out_ND[begin : begin + count] = (rows_ND[begin : begin + count] * (expert + 1) + expert) * part
            begin += count
    return out_ND


class TestSlices:
    @given(routings(), st.data())
    def test_the_slices_of_an_expert_are_summed(
        self, routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], data: st.DataObject
    ) -> None:
        expert_ids_TK, weights_TK, x_TD, num_experts = routing
        units = data.draw(cuts(num_experts))
        plan = dispatch.plan(expert_ids_TK, weights_TK, {unit: data.draw(st.integers(0, 4)) for unit in units})
        rows_ND = dispatch.gather(plan, x_TD)
        num_slices = {expert_of(unit): num_slices_of(unit) for unit in units}
        assert len(rows_ND) == sum(num_slices[expert] for expert in expert_ids_TK.flatten().tolist())
        y_TD = dispatch.combine(plan, slices(plan, rows_ND))
        torch.testing.assert_close(y_TD, expected(expert_ids_TK, weights_TK, x_TD))

    @given(routings(), st.data())
    def test_every_slice_gets_the_rows_of_its_expert(
        self, routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], data: st.DataObject
    ) -> None:
        expert_ids_TK, weights_TK, x_TD, num_experts = routing
        workers = {unit: data.draw(st.integers(0, 4)) for unit in data.draw(cuts(num_experts))}
        plan = dispatch.plan(expert_ids_TK, weights_TK, workers)
        rows_ND = dispatch.gather(plan, x_TD)
        ends = [0, *(shard.end for shard in plan.shards)]
        assert [shard.begin for shard in plan.shards] == ends[:-1]
        assert ends[-1] == len(rows_ND)
        assert [shard.worker for shard in plan.shards] == sorted({shard.worker for shard in plan.shards})
        seen = []
        for shard in plan.shards:
            assert list(shard.expert_ids) == sorted(shard.expert_ids)
            begin = shard.begin
            for unit, count in zip(shard.expert_ids, shard.counts, strict=True):
                assert workers[unit] == shard.worker
                tokens = (expert_ids_TK == expert_of(unit)).any(1)
                assert torch.equal(rows_ND[begin : begin + count], x_TD[tokens]), "in the order of the tokens"
                begin += count
                seen.append(unit)
            work = sum(count / num_slices_of(unit) for unit, count in zip(shard.expert_ids, shard.counts, strict=True))
            assert shard.work == pytest.approx(work)
        chosen = set(expert_ids_TK.flatten().tolist())
        assert sorted(seen) == [unit for unit in workers if expert_of(unit) in chosen]

    @given(routings(), st.data())
    def test_the_sum_has_one_order(
        self, routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], data: st.DataObject
    ) -> None:
        """Rank by rank, slice by slice, whoever computes which."""
        expert_ids_TK, weights_TK, x_TD, num_experts = routing
        units = data.draw(cuts(num_experts))
        num_slices = {expert_of(unit): num_slices_of(unit) for unit in units}
        y_TD = torch.zeros(x_TD.shape)
        for token, ids in enumerate(expert_ids_TK.tolist()):
            for rank, expert in enumerate(ids):
                for unit in units_of(expert, num_slices[expert]):
                    shard = Shard(0, (unit,), (1,), 0, 1)
                    part_D = slices(DispatchPlan(*[torch.empty(0)] * 3, (shard,)), x_TD[token : token + 1])[0]
                    y_TD[token] += part_D * weights_TK[token, rank]
        outs_TD = []
        for _ in range(2):
            plan = dispatch.plan(expert_ids_TK, weights_TK, {unit: data.draw(st.integers(0, 4)) for unit in units})
            outs_TD.append(dispatch.combine(plan, slices(plan, dispatch.gather(plan, x_TD))))
        assert torch.equal(*outs_TD), "bit for bit"
        assert torch.allclose(outs_TD[0], y_TD, rtol=1e-6, atol=1e-6), "multiplying and adding may be one operation"

    def test_that_order_is_of_ranks_and_slices(self) -> None:
        """In float32 a small number is lost between two large ones, and kept after them."""
        workers = {0: 0, **dict(zip(units_of(1, 3), (2, 1, 0), strict=True))}
        plan = dispatch.plan(torch.tensor([[1, 0]]), torch.ones(1, 2), workers)
        assert [shard.expert_ids for shard in plan.shards] == [
            (0, unit_of(1, 2, 3)),
            *[(u,) for u in units_of(1, 3)[1::-1]],
        ]
        small, large = 1.0, 2.0**30
        for by_slice, sum_ in (((large, small, -large), small), ((large, -large, small), 2 * small)):
            rows_N1 = torch.tensor([small, by_slice[2], by_slice[1], by_slice[0]])[:, None]
            assert dispatch.combine(plan, rows_N1).item() == sum_

    def test_all_tokens_to_one_expert(self) -> None:
        workers = {0: 0, 1: 1, **dict(zip(units_of(2, 3), (2, 0, 2), strict=True))}
        plan = dispatch.plan(torch.full((5, 1), 2), torch.ones(5, 1), workers)
        first, second, third = units_of(2, 3)
        assert plan.shards == (Shard(0, (second,), (5,), 0, 5), Shard(2, (first, third), (5, 5), 5, 15))
        assert [shard.work for shard in plan.shards] == pytest.approx([5 / 3, 10 / 3])

    def test_no_tokens(self) -> None:
        empty = torch.empty(0, 2, dtype=torch.int64)
        plan = dispatch.plan(empty, torch.empty(0, 2), {0: 1, **dict.fromkeys(units_of(1, 2), 0)})
        assert plan.shards == ()
        rows_ND = dispatch.gather(plan, torch.empty(0, WIDTH))
        assert rows_ND.shape == (0, WIDTH)
        assert dispatch.combine(plan, rows_ND).shape == (0, WIDTH)

    def test_rows_are_counted_by_expert(self) -> None:
        """A row that goes to four slices is one row of its expert."""
        workers = {0: 0, **dict.fromkeys(units_of(1, 4), 1)}
        plan = dispatch.plan(torch.tensor([[1, 0], [1, 0], [0, 1]]), torch.ones(3, 2), workers)
        counter = RowCounter(dataclasses.replace(TINY, num_experts=2, num_layers=1))
        counter.add(0, plan)
        assert counter.rows_LE == [[3, 3]]
        assert sum(sum(shard.counts) for shard in plan.shards) == 15
