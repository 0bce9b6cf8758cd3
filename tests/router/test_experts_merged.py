"""Two answers of which some rows are not finite: what is good in either is used, what is in neither has none."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router import dispatch
from router.experts import Cause, ExpertPool
from router.experts.answers import RowsWithoutAnswer, merge
from router.legs import Legs
from router.worker_state import WorkerEvent, WorkerState
from tests.router import tiny
from tests.router.test_experts import IDS_TK, WEIGHTS_TK, X_TD, pool_of
from tests.router.test_experts_faults import STILL, idle
from tests.router.tiny import ExpertDouble

PLAN = dispatch.plan(IDS_TK, WEIGHTS_TK, dict.fromkeys(range(8), 0))
ROWS_ND = dispatch.gather(PLAN, X_TD)
GOOD_ND = tiny.experts(1, PLAN.shards[0].expert_ids, PLAN.shards[0].counts, ROWS_ND)


class Spoiling(ExpertDouble):
    """Answers with infinity for the rows of some tokens."""

    def __init__(self, tokens: Collection[int], held: Collection[int] = range(8)) -> None:
        def forward(layer: int, expert_ids: object, counts: object, rows_ND: torch.Tensor) -> torch.Tensor:
            out_ND = tiny.experts(layer, expert_ids, counts, rows_ND).clone()
            for row, row_D in enumerate(rows_ND):
                if any(torch.equal(row_D, X_TD[token]) for token in tokens):
                    out_ND[row, 1] = torch.inf
            return out_ND

        super().__init__(held, forward)


async def send(pool: ExpertPool) -> torch.Tensor:
    """All rows to the first worker."""
    return await pool.forward(0, 1, PLAN.shards, ROWS_ND, Legs())


def of_tokens(*tokens: int) -> torch.Tensor:
    """Which rows are these tokens'."""
    return torch.isin(PLAN.token_of_row_N, torch.tensor(tokens))


def test_what_is_good_in_either_is_used() -> None:
    async def main() -> None:
        first, second = Spoiling([0, 3]), Spoiling([4])
        async with pool_of([first, second], STILL) as pool:
            assert torch.equal(await send(pool), GOOD_ND)
            assert (len(first.calls), len(second.calls)) == (1, 1)
            assert [member.state for member in pool.members] == [WorkerState.SUSPECT, WorkerState.READY]
            assert pool.counters.corrupt == 2
            assert pool.counters.retries == {Cause.CORRUPT: 1}
            assert idle(pool)

    asyncio.run(main())


def test_what_is_good_in_neither_has_no_answer_and_the_rest_has() -> None:
    async def main() -> None:
        first, second = Spoiling([0, 3]), Spoiling([3, 4])
        async with pool_of([first, second], STILL) as pool:
            with pytest.raises(RowsWithoutAnswer, match="2 of 18 rows hold NaN or infinity") as caught:
                await send(pool)
            out_ND = caught.value.rows_ND
            assert torch.isnan(out_ND[of_tokens(3)]).all()
            assert torch.equal(out_ND[~of_tokens(3)], GOOD_ND[~of_tokens(3)])
            assert (len(first.calls), len(second.calls)) == (1, 1)
            assert pool.members[1].state is WorkerState.READY, "it may be the rows"

    asyncio.run(main())


def test_the_first_answer_is_cut_with_its_rows() -> None:
    async def main() -> None:
        links = [Spoiling([0, 3]), Spoiling([3, 4], range(4)), ExpertDouble(range(4, 8))]
        async with pool_of(links, STILL) as pool:
            with pytest.raises(RowsWithoutAnswer) as caught:
                await send(pool)
            is_low_N = torch.repeat_interleave(
                torch.tensor(PLAN.shards[0].expert_ids) < 4, torch.tensor(PLAN.shards[0].counts)
            )
            is_bad_N = of_tokens(3) & is_low_N
            assert is_bad_N.any()
            assert torch.equal(torch.isnan(caught.value.rows_ND).all(1), is_bad_N)
            assert torch.equal(caught.value.rows_ND[~is_bad_N], GOOD_ND[~is_bad_N])

    asyncio.run(main())


def test_who_is_wrong_again_with_other_rows_is_not_excused() -> None:
    async def main() -> None:
        first, second, third = Spoiling([0]), Spoiling([4]), ExpertDouble()
        async with pool_of([first, second, third], STILL) as pool:
            third.is_up = False
            pool.lose(pool.members[2], WorkerEvent.FAILED, "away")
            await send(pool)
            third.is_up = True
            await pool.connect(pool.members[2])
            shard = dispatch.plan(IDS_TK, WEIGHTS_TK, dict.fromkeys(range(8), 1)).shards
            assert torch.equal(await pool.forward(0, 1, shard, ROWS_ND, Legs()), GOOD_ND)
            assert pool.members[1].state is WorkerState.SUSPECT

    asyncio.run(main())


ROW = st.lists(st.sampled_from([0.0, 1.5, float("nan"), float("inf"), float("-inf")]), min_size=3, max_size=3)


@given(st.lists(st.tuples(ROW, ROW), min_size=1, max_size=8))
def test_merged_row_by_row(rows: list[tuple[list[float], list[float]]]) -> None:
    first_ND, second_ND = torch.tensor([each for each, _ in rows]), torch.tensor([each for _, each in rows])
    merged_ND = merge(first_ND, second_ND)
    for first_D, second_D, merged_D in zip(first_ND, second_ND, merged_ND, strict=True):
        good = [row_D for row_D in (second_D, first_D) if torch.isfinite(row_D).all()]
        assert torch.equal(merged_D, good[0]) if good else torch.isnan(merged_D).all()
