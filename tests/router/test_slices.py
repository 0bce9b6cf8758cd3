"""Slices of experts in the pool: failover, waiting, hedging, moving, and cutting an expert while rows go through."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence

import pytest
import torch

from grokmoe import AsyncClient, ExpertRange
from grokmoe import errors as sdk
from grokmoe.errors import ConfigError, FailedPrecondition, InvalidRequest, Reason
from grokmoe.expert_ranges import pairs_of
from grokmoe.expert_spec import describe_units
from grokmoe.expert_units import unit_of, units_of
from router import dispatch
from router.experts import ExpertPool, ExpertPoolSettings, ExpertsUnavailable, SlicingChanged
from router.experts.fitness import check_rows, most_rows_per_token
from router.legs import Legs
from router.moe import RemoteMoe, RowCounter
from router.worker_state import WorkerState
from tests.router import tiny
from tests.router.faulty_experts import Fault, FaultyExpert
from tests.router.movable_experts import PAIR_BYTES, MovableExpert
from tests.router.served import service
from tests.router.test_experts import IDS_TK, PATIENT, QUICK, WEIGHTS_TK, X_TD, pool_of
from tests.router.test_rebalancer import bench
from tests.router.tiny import (
    CONFIG,
    ExpertDouble,
    attention_link,
    expert_info,
    golden_request,
    golden_tokens,
    serving,
    tokens_of,
    units,
    until,
)

LAYERS = CONFIG.num_layers
FIRST, SECOND = units_of(0, 2)
REST = "1-7"


async def moe(pool: ExpertPool, layer: int = 1) -> torch.Tensor:
    """What the experts of a layer make of X_TD, whoever computes what."""
    plan = dispatch.plan(IDS_TK, WEIGHTS_TK, pool.choose(layer))
    rows_ND = await pool.forward(0, layer, plan.shards, dispatch.gather(plan, X_TD), Legs())
    return dispatch.combine(plan, rows_ND)


def expected(spec: str = "all", layer: int = 1) -> torch.Tensor:
    """The same by one function, the experts cut like that."""
    plan = dispatch.plan(IDS_TK, WEIGHTS_TK, dict.fromkeys(units(spec), 0))
    (shard,) = plan.shards
    return dispatch.combine(plan, tiny.experts(layer, shard.expert_ids, shard.counts, dispatch.gather(plan, X_TD)))


def assert_whole(y_TD: torch.Tensor, layer: int = 1) -> None:
    """Near what whole experts give."""
    torch.testing.assert_close(y_TD, expected("all", layer), rtol=1e-5, atol=1e-5)


def used(pool: ExpertPool, layer: int = 1) -> str:
    assert pool.placement is not None
    return describe_units(pool.placement.holders[layer])


HALVES = REST + "+0:all/2"


class TestCalls:
    @pytest.mark.parametrize(
        "specs",
        [
            ("0:1/2+1-7", "0:2/2"),
            ("0:2/2+1-7", "0:1/2+1-7", "0:2/2+3"),
            ("0:all/2+1-7",),
            ("0:1,3/4+1:1/2+2-3", "0:2,4/4+1:2/2+4-7"),
            ("all:1/4", "all:2-3/4", "all:4/4"),
        ],
    )
    def test_slices_are_summed_whoever_holds_them(self, specs: Sequence[str]) -> None:
        """The bits are those of the cut, not of the placement."""

        async def main() -> None:
            links = [ExpertDouble(units(spec)) for spec in specs]
            async with pool_of(links) as pool:
                cut = used(pool)
                for _ in range(3):
                    y_TD = await moe(pool)
                    assert torch.equal(y_TD, expected(cut))
                assert_whole(y_TD)
                assert {member.rows_in_flight for member in pool.members} == {0}

        asyncio.run(main())

    def test_a_lost_holder_s_rows_go_to_the_replica_of_the_slice(self) -> None:
        async def main() -> None:
            lost, other, replica = (ExpertDouble(units(spec)) for spec in ("0:1/2+1-3", "0:2/2+4-7", "0:1/2+1-3"))
            async with pool_of([lost, other, replica]) as pool:
                lost.is_up = False
                assert torch.equal(await moe(pool), expected(HALVES)), "bit for bit"
                assert pool.members[0].state is WorkerState.SUSPECT
                assert {unit for _, ids in replica.calls for unit in ids} == {FIRST, 1, 2, 3}
                assert SECOND not in {unit for _, ids in replica.calls for unit in ids}

        asyncio.run(main())

    def test_without_a_replica_the_slice_is_waited_for_and_never_left_out(self) -> None:
        async def main() -> None:
            lost, other = ExpertDouble(units("0:1/2")), ExpertDouble(units("0:2/2+1-7"))
            async with pool_of([lost, other], PATIENT) as pool:
                lost.is_up = False
                waiting = asyncio.create_task(moe(pool))
                await until(lambda: pool.members[0].state is WorkerState.SUSPECT)
                await asyncio.sleep(0.05)
                assert not waiting.done()
                lost.is_up = True
                assert torch.equal(await waiting, expected(HALVES))
                assert len(other.calls) == 1, "the other half was computed once"

        asyncio.run(main())

    def test_what_is_missing_is_named(self) -> None:
        async def main() -> None:
            lost, other = ExpertDouble(units("0:1/2")), ExpertDouble(units("0:2/2+1-7"))
            async with pool_of([lost, other]) as pool:
                lost.is_up = False
                with pytest.raises(ExpertsUnavailable, match="no worker holds expert 0:1/2 of layer 1"):
                    await moe(pool)

        asyncio.run(main())

    def test_a_hedge_goes_to_a_holder_of_the_slice(self) -> None:
        settings = dataclasses.replace(PATIENT, hedge_quantile=0.5, hedge_share=1.0)

        async def main() -> None:
            slow = FaultyExpert(lambda number: Fault.HANG if number >= 32 else None, held=units("0:1/2"))
            whole, half = ExpertDouble(units("0:2/2+1-7")), ExpertDouble(units("0:1/2"))
            async with pool_of([slow, whole, half], settings) as pool:
                while not pool.counters.hedges_won:
                    assert torch.equal(await moe(pool), expected(HALVES))
                    assert len(slow.calls) < 200
                assert {unit for _, ids in half.calls for unit in ids} == {FIRST}

        asyncio.run(main())

    def test_a_corrupt_answer_of_a_slice_is_asked_for_again(self) -> None:
        async def main() -> None:
            bad = FaultyExpert({0: Fault.NAN, 1: Fault.SHAPE}, held=units("0:1/2"))
            async with pool_of([bad, ExpertDouble(units("0:all/2+1-7"))], PATIENT) as pool:
                for _ in range(4):
                    assert torch.equal(await moe(pool), expected(HALVES))
                    await until(lambda: pool.members[0].is_usable)
                assert pool.counters.corrupt == 2

        asyncio.run(main())

    def test_a_slice_that_was_given_up_is_refused_and_found_elsewhere(self) -> None:
        async def main() -> None:
            a, b = MovableExpert(units("0:1/2+1-7"), "a"), MovableExpert(units("0:all/2"), "b")
            async with pool_of([a, b]) as pool:
                if pool.choose(1)[FIRST] == 0:
                    pool.choose(1)  # the next turn is its own
                a.hold(a.pairs - {(layer, FIRST) for layer in range(LAYERS)})  # by another router
                for _ in range(4):
                    assert torch.equal(await moe(pool), expected(HALVES))
                assert a.refused
                assert pool.members[0].is_usable
                assert not any(FIRST in ids for _, ids in a.calls)

        asyncio.run(main())

    def test_rows_for_a_slice_are_less_work(self) -> None:
        async def main() -> None:
            links = [ExpertDouble(units("0:1/4")), ExpertDouble(units("0:2-4/4+1-7"))]
            async with pool_of(links) as pool:
                await moe(pool)
                num_rows = int((IDS_TK == 0).sum())
                assert num_rows
                assert pool.members[0].rows_sent[1] == pytest.approx(num_rows / 4)
                assert sum(member.rows_sent[1] for member in pool.members) == pytest.approx(IDS_TK.numel())

        asyncio.run(main())


class TestJoining:
    def test_a_slice_that_nobody_holds_is_found_at_start(self) -> None:
        async def main() -> None:
            async with pool_of([ExpertDouble(units("0:1/2+1-7"))], is_connected=False) as pool:
                await pool.connect(pool.members[0])
                with pytest.raises(ConfigError, match="no expert worker holds expert 0:2/2 in layer 0"):
                    pool.place()

        asyncio.run(main())

    @pytest.mark.parametrize(
        ("unit", "words"),
        [(unit_of(0, 0, 3), "3, which does not divide the ffn dimension 128"), (unit_of(0, 0, 8), "slices 16 wide")],
    )
    def test_slices_that_no_expert_can_have(self, unit: int, words: str) -> None:
        async def main() -> None:
            async with pool_of([ExpertDouble([unit])], is_connected=False) as pool:
                with pytest.raises(ConfigError, match=words):
                    await pool.connect(pool.members[0])

        asyncio.run(main())

    def test_rows_of_one_token(self) -> None:
        """Every slice of an expert gets a row; whole and cut it is never used at the same time."""
        assert most_rows_per_token(units("0-3"), 2) == 2
        assert most_rows_per_token(units("0"), 2) == 1
        assert most_rows_per_token(units("0-3:1/2"), 2) == 2
        assert most_rows_per_token(units("0-3:all/2"), 2) == 4
        assert most_rows_per_token(units("0:all/4+1:all/2+2"), 2) == 6
        assert most_rows_per_token(units("0+0:all/2+1:1/2"), 2) == 3
        info = expert_info(units("0-3:all/2"), max_rows=399)
        check_rows(CONFIG, 99, "w", info)
        with pytest.raises(ConfigError, match="takes 399 rows in a call, a step of 100 tokens may send it 400"):
            check_rows(CONFIG, 100, "w", info)


class TestCutOtherwise:
    """An expert whole on one worker and in slices on others: served by either, one at a time."""

    def test_slices_take_the_place_of_a_whole_expert_that_is_lost(self) -> None:
        """In the middle of a call, too: `serving` has a step under way when its worker goes."""

        async def main() -> None:
            whole, first, second = ExpertDouble(), ExpertDouble(units("all:1/2")), ExpertDouble(units("all:2/2"))
            async with serving(attention_link(), [whole, first, second], PATIENT) as engine:
                generation = engine.submit(golden_request("len33"))
                await until(lambda: len(whole.calls) > 4 * LAYERS)
                assert not first.calls
                whole.is_up = False
                assert await tokens_of(generation) == golden_tokens("len33")
                assert first.calls
                assert second.calls
                num_calls = len(whole.calls)
                assert await tokens_of(engine.submit(golden_request("len7"))) == golden_tokens("len7")
                assert len(whole.calls) == num_calls
                whole.is_up = True
                assert engine.pool is not None
                await until(lambda: engine.pool is not None and engine.pool.members[0].is_usable)
                num_halves = len(first.calls)
                assert await tokens_of(engine.submit(golden_request("len2"))) == golden_tokens("len2")
                assert len(first.calls) == num_halves, "the fewest slices are used"

        asyncio.run(main())

    def test_a_whole_expert_takes_the_place_of_slices(self) -> None:
        async def main() -> None:
            links = [ExpertDouble(units(spec)) for spec in ("0:1/2+1-7", "0:2/2", "0:all/4")]
            async with serving(attention_link(), links, PATIENT) as engine:
                links[1].is_up = False
                assert await tokens_of(engine.submit(golden_request("len33"))) == golden_tokens("len33")
                assert engine.pool is not None
                assert used(engine.pool) == "1-7+0:1-4/4"

        asyncio.run(main())

    def test_a_holder_that_hangs_is_given_up_for_slices(self) -> None:
        settings = dataclasses.replace(PATIENT, deadline_cold=0.05, deadline_floor=0.05)

        async def main() -> None:
            whole = FaultyExpert(lambda number: Fault.HANG if number >= 2 else None)
            links = [whole, ExpertDouble(units("all:1/2")), ExpertDouble(units("all:2/2"))]
            async with serving(attention_link(), links, settings) as engine:
                async with asyncio.timeout(5):
                    assert await tokens_of(engine.submit(golden_request("len7"))) == golden_tokens("len7")

        asyncio.run(main())

    def test_rows_that_waited_go_to_what_there_is(self) -> None:
        async def main() -> None:
            whole = ExpertDouble()
            async with pool_of([whole], PATIENT) as pool:
                moe = RemoteMoe(CONFIG, tiny.gates(), pool, counter := RowCounter(CONFIG), tiny.device(), 0, Legs())
                wanted = await moe.fill(1, X_TD)
                counted = [*counter.rows_LE[1]]
                whole.is_up = False
                waiting = asyncio.create_task(moe.fill(1, X_TD))
                await until(lambda: pool.members[0].state is WorkerState.SUSPECT)
                pool.add(ExpertDouble(units("all:1/2")))
                await asyncio.sleep(0.05)
                assert not waiting.done(), "half is not enough"
                pool.add(ExpertDouble(units("all:2/2")))
                torch.testing.assert_close(await waiting, wanted, rtol=1e-5, atol=1e-5)
                assert counter.rows_LE[1] == [2 * count for count in counted], "rows sent anew are the same rows"

        asyncio.run(main())

    def test_who_waits_for_what_is_not_used_any_more_is_told(self) -> None:
        async def main() -> None:
            whole = ExpertDouble()
            async with pool_of([whole], PATIENT) as pool:
                whole.is_up = False
                waiting = asyncio.create_task(moe(pool))
                await until(lambda: pool.members[0].state is WorkerState.SUSPECT)
                pool.add(ExpertDouble(units("all:all/2")))
                with pytest.raises(SlicingChanged):
                    await waiting

        asyncio.run(main())


@contextlib.asynccontextmanager
async def three(
    *specs: str, settings: ExpertPoolSettings = QUICK
) -> AsyncIterator[tuple[MovableExpert, MovableExpert, MovableExpert, ExpertPool]]:
    links = [MovableExpert(units(spec), name) for spec, name in zip(specs, "abc", strict=True)]
    async with pool_of(links, settings) as pool:
        yield *links, pool


def of(spec: str) -> list[tuple[int, int, int]]:
    return [(unit, 0, 0) for unit in units(spec)]


class TestMoves:
    def test_a_slice_moves(self) -> None:
        async def main() -> None:
            async with three("0:1/2+1-3", "0:2/2+4-7", "none") as (a, b, c, pool):
                cost = await pool.moves.make(of("0:2/2"), "b", "c")
                assert cost.loaded_bytes == LAYERS * PAIR_BYTES
                assert c.told == [("load", {(layer, SECOND) for layer in range(LAYERS)})]
                assert b.told == [("unload", {(layer, SECOND) for layer in range(LAYERS)})]
                assert pool.placement is not None
                assert pool.placement.holders[1][SECOND] == (2,)
                assert torch.equal(await moe(pool), expected(HALVES))
                assert a.refused == b.refused == c.refused == []

        asyncio.run(main())

    def test_a_replica_of_one_slice_comes_and_goes(self) -> None:
        async def main() -> None:
            async with three("0:1/2+1-7", "0:2/2", "none") as (a, _, _, pool):
                await pool.moves.make([(FIRST, 1, 2)], "", "c")
                assert pool.placement is not None
                assert pool.placement.holders[1][FIRST] == (0, 2)
                assert pool.placement.holders[0][FIRST] == (0,)
                await pool.moves.make([(FIRST, 1, 2)], "a", "")
                assert (1, FIRST) not in a.pairs
                assert torch.equal(await moe(pool), expected(HALVES))
                with pytest.raises(FailedPrecondition, match="last ready holder of expert 0:1/2 in layer 0") as last:
                    await pool.moves.make([(FIRST, 0, 1)], "a", "")
                assert last.value.reason is Reason.LAST_HOLDER

        asyncio.run(main())

    def test_an_expert_is_cut_and_put_together_while_rows_go_through(self) -> None:
        async def main() -> None:
            async with three("all", "none", "none", settings=PATIENT) as (a, _, _, pool):
                stop, cuts = asyncio.Event(), []

                async def go_on() -> None:
                    while not stop.is_set():
                        with contextlib.suppress(SlicingChanged):
                            assert_whole(await moe(pool))
                        cuts.append(used(pool))
                        await asyncio.sleep(0)

                going = asyncio.create_task(go_on())
                await pool.moves.make(of("0:1/2"), "", "b")
                with pytest.raises(FailedPrecondition, match="last ready holder of expert 0 in layer 0"):
                    await pool.moves.make(of("0"), "a", "")
                await pool.moves.make(of("0:2/2"), "", "c")
                assert used(pool) == "0-7", "as long as it is there whole"
                await pool.moves.make(of("0"), "a", "")
                assert used(pool) == HALVES.replace("all", "1-2")
                assert torch.equal(await moe(pool), expected(HALVES))
                assert not any(unit == 0 for _, unit in a.pairs)
                with pytest.raises(FailedPrecondition, match="last ready holder of expert 0:2/2"):
                    await pool.moves.make(of("0:2/2"), "c", "")
                await pool.moves.make(of("0"), "", "b")
                assert used(pool) == "0-7"
                await pool.moves.make(of("0:2/2"), "c", "")
                await pool.moves.make(of("0:1/2"), "b", "")
                assert torch.equal(await moe(pool), expected())
                stop.set()
                await going
                assert {"0-7", HALVES.replace("all", "1-2")} <= set(cuts)
                assert pool.moves.under_way == []

        asyncio.run(main())

    def test_a_worker_may_hold_it_whole_and_cut(self) -> None:
        """Everything on one worker, cut in place: it needs room for both for a while, and never anyone else."""

        async def main() -> None:
            async with pool_of([MovableExpert(range(8), "a")], PATIENT) as pool:
                await pool.moves.make(of("0:all/4"), "", "a")
                await pool.moves.make(of("0"), "a", "")
                assert used(pool) == "1-7+0:1-4/4"
                assert torch.equal(await moe(pool), expected("1-7+0:all/4"))

        asyncio.run(main())

    @pytest.mark.parametrize(
        ("asked", "field", "words"),
        [
            ((unit_of(0, 0, 3), 0, 0), "experts[0].num_slices", "is 3, which does not divide the ffn dimension 128"),
            ((unit_of(9, 0, 2), 0, 0), "experts[0].expert", "is 9"),
            ((0, 0, 0), "experts[0]", "does not hold expert 0 in all layers from 0 to 2; it holds 0:1/2"),
            ((SECOND, 0, 0), "experts[0]", "does not hold expert 0:2/2 in all layers from 0 to 2; it holds 0:1/2"),
            ((unit_of(1, 0, 2), 0, 0), "experts[0]", "does not hold expert 1:1/2 in all layers .* it holds 1$"),
        ],
    )
    def test_moves_that_cannot_be(self, asked: tuple[int, int, int], field: str, words: str) -> None:
        async def main() -> None:
            async with three("0:1/2+1-7", "0:2/2", "none") as (_, _, _, pool):
                with pytest.raises(InvalidRequest, match=words) as raised:
                    await pool.moves.make([asked], "a", "c")
                assert raised.value.field == field
                assert pool.moves.under_way == []

        asyncio.run(main())

    def test_a_load_that_fails_changes_nothing(self) -> None:
        async def main() -> None:
            async with three("0:1/2+1-7", "0:2/2", "none") as (_, _, c, pool):
                c.is_up = False
                with pytest.raises(sdk.Unavailable):
                    await pool.moves.make(of("0:2/2"), "b", "c")
                assert torch.equal(await moe(pool), expected(HALVES))
                assert used(pool) == HALVES.replace("all", "1-2")

        asyncio.run(main())


class TestControl:
    def test_status_and_moves_of_slices(self) -> None:
        """Through the SDK: what is held is told, and what is told can be asked for."""

        async def main() -> None:
            links = [MovableExpert(units("0:1/2+1-7"), "a"), MovableExpert(units("0:2/2"), "b"), MovableExpert([], "c")]
            async with service(expert_links=links) as served:
                client: AsyncClient = served.client
                await client.generate([5, 6, 7], max_tokens=4, ignore_eos=True)
                status = await client.status()
                workers = [worker for worker in status.workers if worker.address in ("a", "b", "c")]
                assert workers[1].held == (ExpertRange(0, 0, LAYERS, 1, 2),)
                assert workers[0].experts == tuple(range(8))
                assert ExpertRange(3, 0, LAYERS) in workers[0].held
                first, second, third = status.placement[:3]
                assert (first.expert, first.slice, first.num_slices, first.workers) == (0, 0, 2, (0,))
                assert (second.expert, second.slice, second.num_slices, second.workers) == (0, 1, 2, (1,))
                assert first.rows == second.rows
                assert (third.expert, third.slice, third.num_slices) == (1, 0, 1)
                assert [each.expert for each in status.placement[2:]] == list(range(1, 8))
                await client.move_experts(ExpertRange(0, 0, 0, 1, 2), source="b", target="c")
                assert links[2].pairs == pairs_of([(SECOND, 0, LAYERS)])
                assert links[1].pairs == set()
                with pytest.raises(sdk.InvalidRequest, match="is 2, of 2 slices"):
                    await client.move_experts(ExpertRange(0, 0, 0, 2, 2), source="c", target="b")

        asyncio.run(main())


class TestRebalancing:
    def test_slices_are_moved_to_even_out_the_load(self) -> None:
        """Experts 0 and 1 have all the load, and both first halves are on one worker."""

        async def main() -> None:
            links = MovableExpert(units("0-1:1/2+2-7"), "a"), MovableExpert(units("0-1:2/2"), "b")
            spare = MovableExpert([], "c")
            async with bench(*links, spare) as busy:
                await busy.send([0, 1, 0, 1, 2], 1000)
                assert busy.pool.rebalancer.traffic.imbalance() > 1.3
                for member in busy.pool.members:
                    member.computed = {5: (1000.0, 1.0)}  # what the machine made of so few rows says nothing
                done = await busy.pool.rebalancer.rebalance()
                assert done.done, done
                assert done.forecast < 1.25
                assert spare.pairs
                await busy.send([0, 1, 0, 1, 2], 1000)
                await busy.send([0, 1, 0, 1, 2], 1000)
                assert busy.pool.rebalancer.traffic.imbalance() < 1.25
                assert torch.equal(await moe(busy.pool), expected("0-1:all/2+2-7"))

        asyncio.run(main())

    def test_an_expert_held_in_several_ways_is_said(self) -> None:
        async def main() -> None:
            links = MovableExpert(units("all"), "a"), MovableExpert(units("0:1/2"), "b")
            async with bench(*links) as busy:
                await busy.send([0, 1, 2], 1000)
                found = await busy.pool.rebalancer.rebalance()
                assert found.reason == "expert 0 of layer 0 is held in 1 and in 2 slices: drop what is not to stay"
                assert not found.moves

        asyncio.run(main())
