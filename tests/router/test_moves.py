"""Experts move while rows are on their way: no row is lost, no bit changes, and what fails changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import AsyncIterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grokmoe.errors import (
    FailedPrecondition,
    GrokmoeError,
    InternalError,
    InvalidRequest,
    NotFound,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from router import dispatch
from router.experts import Cause, ExpertPool, ExpertPoolSettings, Phase
from router.legs import Legs
from router.placement import pairs_of
from router.worker_state import WorkerEvent, WorkerState
from tests.router.movable_experts import PAIR_BYTES, MovableExpert
from tests.router.test_experts import X_TD, call, expected, pool_of
from tests.router.tiny import CONFIG, until

LAYERS = CONFIG.num_layers
QUICK = ExpertPoolSettings(replica_wait=20.0, probe_interval=0.005, probe_interval_max=0.02, unload_patience=0.2)


def whole(*experts: int) -> list[tuple[int, int, int]]:
    """In all layers."""
    return [(expert, 0, LAYERS) for expert in experts]


def holders(pool: ExpertPool, layer: int, expert: int) -> tuple[int, ...]:
    assert pool.placement is not None
    return pool.placement.holders[layer][expert]


@contextlib.asynccontextmanager
async def two(
    capacity: int = 0, settings: ExpertPoolSettings = QUICK
) -> AsyncIterator[tuple[MovableExpert, MovableExpert, ExpertPool]]:
    """Workers `a` with experts 0 to 3 and `b` with the others."""
    links = MovableExpert(range(4), "a", capacity), MovableExpert(range(4, 8), "b", capacity)
    async with pool_of(links, settings) as pool:
        yield *links, pool


class TestMove:
    def test_a_move(self) -> None:
        async def main() -> None:
            async with two() as (a, b, pool):
                version = pool.placement_version
                cost = await pool.moves.make([(3, 0, 0)], "a", "b")
                assert cost.loaded_bytes == LAYERS * PAIR_BYTES
                assert a.told == [("unload", pairs_of(whole(3)))]
                assert b.told == [("load", pairs_of(whole(3)))]
                assert all(holders(pool, layer, 3) == (1,) for layer in range(LAYERS))
                assert pool.placement_version == version + 2, "both hold it, then one"
                assert pool.moves.under_way == []
                assert torch.equal(await call(pool), expected())
                assert a.refused == b.refused == []

        asyncio.run(main())

    def test_a_copy_and_a_drop_of_some_layers(self) -> None:
        async def main() -> None:
            async with two() as (a, _, pool):
                await pool.moves.make([(0, 0, 1)], "", "b")
                assert holders(pool, 0, 0) == (0, 1)
                assert holders(pool, 1, 0) == (0,)
                cost = await pool.moves.make([(0, 0, 1)], "a", "")
                assert cost.loaded_bytes == 0
                assert holders(pool, 0, 0) == (1,)
                assert holders(pool, 1, 0) == (0,)
                assert (0, 0) not in a.pairs
                assert torch.equal(await call(pool, 0), expected(0))

        asyncio.run(main())

    def test_what_is_there_costs_nothing(self) -> None:
        async def main() -> None:
            async with pool_of([MovableExpert(range(8), "a"), MovableExpert(range(8), "b")], QUICK) as pool:
                cost = await pool.moves.make(whole(1), "a", "b")
                assert cost.loaded_bytes == 0
                assert holders(pool, 0, 1) == (1,)

        asyncio.run(main())

    def test_nothing_waits_while_it_loads_and_drains(self) -> None:
        async def main() -> None:
            async with two() as (a, b, pool):
                b.may_load.clear()
                move = asyncio.create_task(pool.moves.make(whole(3), "a", "b"))
                await until(lambda: bool(b.told))
                (under_way,) = pool.moves.under_way
                assert under_way.phase is Phase.LOADING
                assert torch.equal(await call(pool), expected())
                a.may_answer.clear()
                slow = asyncio.create_task(call(pool))
                await until(lambda: pool.members[0].calls_in_flight == 1)
                b.may_load.set()
                await until(lambda: holders(pool, 1, 3) == (1,))
                assert pool.moves.under_way[0].phase is Phase.DRAINING
                plan = dispatch.plan(torch.tensor([[3]]), torch.ones(1, 1), pool.choose(1))
                assert [shard.worker for shard in plan.shards] == [1], "the old holder gets no new rows"
                await pool.forward(0, 1, plan.shards, dispatch.gather(plan, X_TD[:1]), Legs())
                assert ("unload", pairs_of(whole(3))) not in a.told, "it has a call to answer"
                a.may_answer.set()
                assert torch.equal(await slow, expected())
                assert (await move).drain_seconds > 0
                assert 3 not in {expert for _, expert in a.pairs}

        asyncio.run(main())

    def test_a_drain_ends_under_steady_load(self) -> None:
        """Calls overlap without a pause; those begun after the switch are not waited for."""

        async def main() -> None:
            async with two() as (a, _, pool):
                stop = False

                async def load() -> None:
                    while not stop:
                        assert torch.equal(await call(pool), expected())

                tasks = [asyncio.create_task(load()) for _ in range(6)]
                for _ in range(10):
                    await pool.moves.make(whole(3), "a", "b")
                    await pool.moves.make(whole(3), "b", "a")
                stop = True
                await asyncio.gather(*tasks)
                assert a.refused == [] or pool.counters.retries[Cause.NOT_HELD]

        asyncio.run(main())

    def test_a_caller_that_goes_away_leaves_the_move_to_its_end(self) -> None:
        async def main() -> None:
            async with two() as (_, b, pool):
                b.may_load.clear()
                caller = asyncio.create_task(pool.moves.make(whole(3), "a", "b"))
                await until(lambda: bool(b.told))
                caller.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await caller
                b.may_load.set()
                await until(lambda: not pool.moves.under_way)
                assert holders(pool, 0, 3) == (1,)

        asyncio.run(main())

    def test_moves_of_one_worker_come_one_after_the_other(self) -> None:
        async def main() -> None:
            async with two() as (_, b, pool):
                b.may_load.clear()
                one = asyncio.create_task(pool.moves.make(whole(3), "a", "b"))
                await until(lambda: bool(b.told))
                other = asyncio.create_task(pool.moves.make(whole(4), "b", "a"))
                await until(lambda: len(pool.moves.under_way) == 2)
                assert [move.phase for move in pool.moves.under_way] == [Phase.LOADING, Phase.WAITING]
                b.may_load.set()
                await asyncio.gather(one, other)
                assert holders(pool, 0, 3) == (1,)
                assert holders(pool, 0, 4) == (0,)

        asyncio.run(main())

    def test_a_table_from_outside_gives_way_to_a_move(self) -> None:
        async def main() -> None:
            links = MovableExpert(range(4), "a"), MovableExpert(range(4, 8), "b")
            pool = ExpertPool(CONFIG, torch.float32, links, {3: [0], 4: [1]}, QUICK)
            for member in pool.members:
                await pool.connect(member)
            pool.place()
            await pool.moves.make(whole(3), "", "b")
            assert holders(pool, 0, 3) == (0, 1)
            assert pool.has_preferences, "of the other expert"
            await pool.close()

        asyncio.run(main())


class TestRefusals:
    @pytest.mark.parametrize(
        ("experts", "source", "target", "field"),
        [
            ([], "a", "b", "experts"),
            ([(0, 0, 0)], "", "", "to"),
            ([(0, 0, 0)], "a", "a", "to"),
            ([(0, 0, 0), (8, 0, 0)], "a", "b", "experts[1].expert"),
            ([(0, 0, LAYERS + 1)], "a", "b", "experts[0].layer_end"),
            ([(0, 1, 1)], "a", "b", "experts[0].layer_end"),
            ([(0, LAYERS, 0)], "a", "b", "experts[0].layer_end"),
            ([(0, 0, 0), (4, 0, 1)], "a", "b", "experts[1]"),
        ],
    )
    def test_what_cannot_be(self, experts: list[tuple[int, int, int]], source: str, target: str, field: str) -> None:
        async def main() -> None:
            async with two() as (a, b, pool):
                with pytest.raises(InvalidRequest) as caught:
                    await pool.moves.make(experts, source, target)
                assert caught.value.field == field
                assert a.told == b.told == []

        asyncio.run(main())

    def test_a_stranger(self) -> None:
        async def main() -> None:
            async with two() as (_, _, pool):
                with pytest.raises(NotFound, match="no expert worker at c"):
                    await pool.moves.make(whole(0), "a", "c")

        asyncio.run(main())

    def test_the_last_holder_keeps_its_experts(self) -> None:
        async def main() -> None:
            async with pool_of([MovableExpert(range(8), "a"), MovableExpert(range(4), "b")], QUICK) as pool:
                with pytest.raises(FailedPrecondition, match=r"last ready holder of expert 5 in layer 0") as caught:
                    await pool.moves.make(whole(1, 5), "a", "")
                assert caught.value.reason is Reason.LAST_HOLDER
                assert holders(pool, 0, 1) == (0, 1)
                pool.lose(pool.members[1], WorkerEvent.FAILED, "as if")
                with pytest.raises(FailedPrecondition):
                    await pool.moves.make(whole(1), "a", "")
                assert pool.moves.under_way == []

        asyncio.run(main())

    def test_two_drops_at_once_leave_one_holder(self) -> None:
        async def main() -> None:
            links = [MovableExpert(range(8), name) for name in "ab"]
            async with pool_of(links, QUICK) as pool:
                drops = [pool.moves.make(whole(1), name, "") for name in "ab"]
                outcomes = await asyncio.gather(*drops, return_exceptions=True)
                assert sorted(isinstance(each, FailedPrecondition) for each in outcomes) == [False, True]
                assert len(holders(pool, 0, 1)) == 1

        asyncio.run(main())

    def test_no_room(self) -> None:
        async def main() -> None:
            async with two(capacity=4 * LAYERS) as (a, _, pool):
                version = pool.placement_version
                with pytest.raises(ResourceExhausted, match="full") as caught:
                    await pool.moves.make(whole(3), "a", "b")
                assert caught.value.reason is Reason.NO_ROOM
                assert a.told == []
                assert (holders(pool, 0, 3), pool.placement_version) == ((0,), version)

        asyncio.run(main())


class TestFaults:
    def test_a_target_that_dies_while_it_loads(self) -> None:
        async def main() -> None:
            async with two() as (a, b, pool):
                b.may_load.clear()
                move = asyncio.create_task(pool.moves.make(whole(3), "a", "b"))
                await until(lambda: bool(b.told))
                b.is_up = False
                b.may_load.set()
                with pytest.raises(Unavailable, match="died while loading"):
                    await move
                assert holders(pool, 0, 3) == (0,)
                assert a.told == []
                assert pool.moves.under_way == []

        asyncio.run(main())

    def test_a_target_that_says_it_has_loaded_and_has_not(self) -> None:
        class Liar(MovableExpert):
            def hold(self, pairs: object) -> None: ...

        async def main() -> None:
            liar = Liar(range(4, 8), "b")
            async with pool_of([MovableExpert(range(4), "a"), liar], QUICK) as pool:
                with pytest.raises(InternalError, match="does not hold them"):
                    await pool.moves.make(whole(3), "a", "b")
                assert liar.told[-1][0] == "unload", "what may be there is given back"
                assert holders(pool, 0, 3) == (0,)
                assert torch.equal(await call(pool), expected())

        asyncio.run(main())

    def test_a_target_lost_after_loading_leaves_the_source_in_use(self) -> None:
        async def main() -> None:
            async with two() as (a, b, pool):
                b.may_describe.clear()
                move = asyncio.create_task(pool.moves.make(whole(3), "a", "b"))
                await until(lambda: 3 in {expert for _, expert in b.pairs})
                pool.lose(pool.members[1], WorkerEvent.FAILED, "as if")
                b.may_describe.set()
                with pytest.raises(Unavailable):
                    await move
                assert 0 in holders(pool, 0, 3)
                assert a.told == []
                await until(lambda: pool.members[1].state is WorkerState.READY)
                assert torch.equal(await call(pool), expected())

        asyncio.run(main())

    def test_a_source_that_dies_while_it_drains(self) -> None:
        """Its calls fail and go to the new holder; when it is back as it was, it gives the experts up after all."""

        async def main() -> None:
            patient = dataclasses.replace(QUICK, unload_patience=60.0)
            async with two(settings=patient) as (a, b, pool):
                b.may_load.clear()
                move = asyncio.create_task(pool.moves.make(whole(3), "a", "b"))
                await until(lambda: bool(b.told))
                b.may_load.set()
                a.is_up = False
                await until(lambda: holders(pool, 0, 3) == (1,))
                plan = dispatch.plan(torch.tensor([[3]]), torch.ones(1, 1), pool.choose(1))
                await pool.forward(0, 1, plan.shards, dispatch.gather(plan, X_TD[:1]), Legs())
                await until(lambda: bool(a.told))
                a.is_up = True
                await move
                assert 3 not in {expert for _, expert in a.pairs}
                assert torch.equal(await call(pool), expected())

        asyncio.run(main())

    def test_a_source_that_starts_anew_ends_the_move(self) -> None:
        async def main() -> None:

            async with two() as (a, _, pool):
                a.may_answer.clear()
                slow = asyncio.create_task(call(pool))
                await until(lambda: pool.members[0].calls_in_flight == 1)
                move = asyncio.create_task(pool.moves.make(whole(3), "a", "b"))
                await until(lambda: [move.phase for move in pool.moves.under_way] == [Phase.DRAINING])
                a.info = dataclasses.replace(a.info, incarnation="two", revision=1)
                pool.lose(pool.members[0], WorkerEvent.FAILED, "as if")
                await until(lambda: pool.members[0].state is WorkerState.READY)
                a.may_answer.set()
                assert torch.equal(await slow, expected())
                await move
                assert a.told == []
                assert holders(pool, 0, 3) == (0, 1), "it holds what it was started with"

        asyncio.run(main())

    def test_a_source_that_stays_away_is_not_waited_for(self) -> None:
        async def main() -> None:
            async with two() as (a, b, pool):
                a.is_up = False
                await asyncio.wait_for(pool.moves.make(whole(3), "a", "b"), 10)
                assert 1 in holders(pool, 0, 3)
                assert b.refused == []

        asyncio.run(main())


class TestSharedWorkers:
    """Two routers with one set of workers: each sees what the other one moves."""

    def test_another_router_s_move_is_seen_by_its_revision(self) -> None:
        async def main() -> None:
            async with two() as (_, b, pool):
                b.hold(b.pairs | pairs_of(whole(0)))
                num_described = b.num_described
                assert torch.equal(await call(pool), expected())
                await until(lambda: holders(pool, 0, 0) == (0, 1))
                assert b.num_described == num_described + 1
                await call(pool)
                assert b.num_described == num_described + 1, "asked once"
                assert pool.members[1].is_usable

        asyncio.run(main())

    def test_no_call_waits_for_the_description(self) -> None:
        async def main() -> None:
            async with two() as (_, b, pool):
                b.hold(b.pairs | pairs_of(whole(0)))
                b.may_describe.clear()
                for _ in range(5):
                    assert torch.equal(await call(pool), expected())
                assert len(pool._asking) == 1
                b.may_describe.set()
                await until(lambda: holders(pool, 0, 0) == (0, 1))

        asyncio.run(main())

    def test_rows_for_what_is_gone_go_elsewhere_at_once(self) -> None:
        async def main() -> None:
            async with two() as (a, b, pool):
                b.hold(b.pairs | pairs_of(whole(3)))
                await pool.describe_again(pool.members[1])
                a.hold(a.pairs - pairs_of(whole(3)))
                a.may_describe.clear()
                for _ in range(200):  # which of the two is asked is drawn; never a in 200 draws is a fault
                    assert torch.equal(await call(pool), expected())
                    if a.refused:
                        break
                assert pool.members[0].is_usable, "no fault of the worker"
                assert pool.counters.failovers == 0
                assert pool.counters.retries[Cause.NOT_HELD] >= 1
                a.may_describe.set()
                await until(lambda: holders(pool, 1, 3) == (1,) and 0 in holders(pool, 1, 2))
                num_refused = len(a.refused)
                assert torch.equal(await call(pool), expected())
                assert len(a.refused) == num_refused

        asyncio.run(main())

    def test_rows_wait_until_somebody_is_known_to_have_it(self) -> None:
        """The other router moved all to a worker that this one has not heard of since."""

        async def main() -> None:
            links = MovableExpert(range(8), "a"), MovableExpert([], "b")
            async with pool_of(links, QUICK) as pool:
                links[1].hold(links[0].pairs)
                links[0].hold([])
                assert torch.equal(await call(pool), expected())
                assert pool.counters.failovers == 0
                assert holders(pool, 0, 0) == (1,)

        asyncio.run(main())

    def test_a_worker_that_does_not_say_what_it_holds_is_out_of_use(self) -> None:
        async def main() -> None:
            async with two() as (a, b, pool):
                b.hold(b.pairs | pairs_of(whole(*range(4))))
                await pool.describe_again(pool.members[1])
                a.hold(a.pairs - pairs_of(whole(3)))
                fail = a.describe

                async def away() -> object:
                    raise Unavailable("silent")

                a.describe = away  # type: ignore[assignment, method-assign]
                assert torch.equal(await call(pool), expected())
                await until(lambda: pool.members[0].state is WorkerState.SUSPECT)
                a.describe = fail  # type: ignore[method-assign]
                await until(lambda: pool.members[0].is_usable)
                assert holders(pool, 1, 3) == (1,)

        asyncio.run(main())

    def test_two_routers_under_load(self) -> None:
        async def main() -> None:
            links = [MovableExpert(range(4), "a"), MovableExpert(range(4, 8), "b")]
            async with pool_of(links, QUICK) as one, pool_of(links, QUICK) as two_:
                stop = False

                async def load(pool: ExpertPool) -> int:
                    count = 0
                    while not stop:
                        assert torch.equal(await call(pool), expected())
                        count += 1
                    return count

                tasks = [asyncio.create_task(load(pool)) for pool in (one, two_) for _ in range(3)]
                for _ in range(5):
                    await one.moves.make(whole(3), "a", "b")
                    await until(lambda: holders(two_, 0, 3) == (1,))
                    await two_.moves.make(whole(3), "b", "a")
                    await until(lambda: holders(one, 0, 3) == (0,))
                stop = True
                assert sum(await asyncio.gather(*tasks)) > 20
                assert one.counters.failovers == two_.counters.failovers == 0

        asyncio.run(main())


@given(st.integers(0, 2**32), st.integers(2, 4))
@settings(max_examples=25, deadline=None)
def test_moves_at_random_under_load(seed: int, num_workers: int) -> None:
    """Any moves, any refusals: rows come back right, every expert has a holder at any time, nothing is left over."""

    async def main() -> None:
        draw = random.Random(seed)
        links = [MovableExpert(range(8), str(index), 8 * LAYERS) for index in range(num_workers)]
        async with pool_of(links, QUICK) as pool:
            stop = False

            async def load() -> None:
                while not stop:
                    layer = draw.randrange(LAYERS)
                    assert torch.equal(await call(pool, layer), expected(layer))
                    assert pool.placement is not None
                    assert all(workers for row in pool.placement.holders for workers in row.values())

            async def move() -> None:
                names = ["", *map(str, range(num_workers))]
                begin = draw.randrange(LAYERS)
                end = draw.randint(begin + 1, LAYERS)
                ranges = [(draw.randrange(8), begin, end) for _ in range(draw.randint(1, 3))]
                with contextlib.suppress(GrokmoeError):
                    await pool.moves.make(ranges, draw.choice(names), draw.choice(names))

            tasks = [asyncio.create_task(load()) for _ in range(2)]
            for _ in range(6):
                await asyncio.gather(*(move() for _ in range(draw.randint(1, 3))))
            stop = True
            await asyncio.gather(*tasks)
            assert pool.moves.under_way == []
            assert all(not member.withdrawn and not member.calls_in_flight for member in pool.members)
            for member, link in zip(pool.members, links, strict=True):
                assert pairs_of(member.held) == link.pairs, "the table says what is"

    asyncio.run(main())
