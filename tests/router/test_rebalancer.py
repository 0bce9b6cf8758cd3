"""Rebalancing a pool of doubles: measured, planned, moved; and the control service and its status on top."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

import grpc
import pytest
import torch

from grokmoe import AsyncClient, ExpertRange
from grokmoe import errors as sdk
from grokmoe.errors import ConfigError, Reason, ResourceExhausted
from grokmoe.server import RoleServer
from grokmoe.v1 import control_pb2
from router import dispatch
from router.config import RouterSettings
from router.control import ControlService
from router.engine import Engine
from router.experts import ExpertPool, ExpertPoolSettings
from router.legs import Legs
from router.moe import RowCounter
from router.rebalancing import RebalanceSettings
from router.worker_state import WorkerEvent
from tests.router.movable_experts import MovableExpert
from tests.router.served import service
from tests.router.test_moves import holders
from tests.router.tiny import CONFIG, DTYPE, attention_link, golden_request, golden_tokens, serving, tokens_of, until

LAYERS = CONFIG.num_layers
EAGER = RebalanceSettings(min_rows=100, horizon=1e6, load_rate=1e9, interval=0.02, patience=2, cooldown=60.0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A pool whose traffic and clock the test makes."""

    def __init__(self, pool: ExpertPool) -> None:
        self.pool, self.counter, self.clock = pool, RowCounter(CONFIG), Clock()
        pool.rebalancer._clock = self.clock
        pool.rebalancer._rows_LE = self.counter.rows_LE
        pool.rebalancer.look()

    async def send(self, experts: list[int], num_rows: int, seconds: float = 30.0) -> None:
        """Rows for these experts in every layer, in turn, and then time goes by."""
        ids_TK = torch.tensor([[experts[row % len(experts)]] for row in range(num_rows)])
        x_TD = torch.randn(num_rows, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
        for layer in range(LAYERS):
            plan = dispatch.plan(ids_TK, torch.ones(num_rows, 1), self.pool.choose(layer))
            self.counter.add(layer, plan)
            await self.pool.forward(0, layer, plan.shards, dispatch.gather(plan, x_TD), Legs())
        self.clock.now += seconds
        self.pool.rebalancer.look()


@contextlib.asynccontextmanager
async def bench(
    *links: MovableExpert, limits: RebalanceSettings = EAGER, preferred: dict[int, list[int]] | None = None
) -> AsyncIterator[Bench]:
    pool = ExpertPool(CONFIG, DTYPE, links, preferred, ExpertPoolSettings(probe_interval=30.0, rebalance=limits))
    for member in pool.members:
        await pool.connect(member)
    pool.place()
    try:
        yield Bench(pool)
    finally:
        await pool.close()


def halves(capacity: int = 0) -> tuple[MovableExpert, MovableExpert]:
    return MovableExpert(range(4), "a", capacity), MovableExpert(range(4, 8), "b", capacity)


HOT = [0, 1, 2, 0, 1, 2, 0, 1, 2, 4]


class TestRebalance:
    def test_a_skewed_load_is_evened_out(self) -> None:
        async def main() -> None:
            async with bench(*halves()) as test:
                await test.send(HOT, 200)
                found = await test.pool.rebalancer.rebalance()
                assert found.imbalance == pytest.approx(1.8), "nine tenths of the rows are for experts of one of two"
                assert found.done
                assert found.moves
                assert found.forecast < 1.3
                assert found.gain_seconds > found.cost_seconds
                for _ in range(3):
                    await test.send(HOT, 200)
                assert test.pool.rebalancer.traffic.imbalance() == pytest.approx(found.forecast, abs=0.05)

        asyncio.run(main())

    def test_a_dry_run_moves_nothing(self) -> None:
        async def main() -> None:
            a, b = halves()
            async with bench(a, b) as test:
                await test.send(HOT, 200)
                found = await test.pool.rebalancer.rebalance(dry_run=True)
                assert found.moves
                assert not found.done
                assert found.reason == ""
                assert a.told == b.told == []

        asyncio.run(main())

    @pytest.mark.parametrize(
        ("experts", "num_rows", "limits", "reason"),
        [
            (HOT, 20, {}, "fewer than 100 rows"),
            (list(range(8)), 800, {}, "no better placement"),
            (HOT, 200, {"threshold": 1.9}, "the imbalance does not exceed 1.9"),
            (HOT, 200, {"horizon": 1e-6}, "the gain does not exceed the cost"),
        ],
    )
    def test_reasons_to_leave_things_as_they_are(
        self, experts: list[int], num_rows: int, limits: dict[str, float], reason: str
    ) -> None:
        async def main() -> None:
            settings = dataclasses.replace(EAGER, **limits)  # type: ignore[arg-type]
            async with bench(*halves(), limits=settings) as test:
                await test.send(experts, num_rows)
                found = await test.pool.rebalancer.rebalance()
                assert reason in found.reason
                assert not found.done
                forced = await test.pool.rebalancer.rebalance(force=True)
                assert forced.done == bool(limits), "force overrules the verdict, and nothing else"

        asyncio.run(main())

    def test_a_worker_that_is_away_is_waited_for(self) -> None:
        async def main() -> None:
            async with bench(MovableExpert(range(8), "a"), MovableExpert(range(8), "b")) as test:
                await test.send(HOT, 200)
                test.pool.lose(test.pool.members[1], WorkerEvent.FAILED, "as if")
                found = await test.pool.rebalancer.rebalance(force=True)
                assert "is not in use" in found.reason

        asyncio.run(main())

    def test_a_table_from_outside_is_left_alone(self) -> None:
        async def main() -> None:
            async with bench(*halves(), preferred={0: [0]}) as test:
                await test.send(HOT, 200)
                assert "given at start" in (await test.pool.rebalancer.rebalance(force=True)).reason

        asyncio.run(main())

    def test_replicas_are_kept(self) -> None:
        """Every expert has two holders before and after, whatever the load is."""

        async def main() -> None:
            held = [{0, 1, 2, 3}, {0, 1, 2, 3}, {4, 5, 6, 7}, {4, 5, 6, 7}]
            links = [MovableExpert(experts, str(index)) for index, experts in enumerate(held)]
            async with bench(*links) as test:
                await test.send(HOT, 200)
                assert (await test.pool.rebalancer.rebalance()).done
                assert all(len(holders(test.pool, layer, each)) >= 2 for layer in range(LAYERS) for each in range(8))

        asyncio.run(main())

    def test_a_step_that_fails_leaves_a_whole_placement(self) -> None:
        class Full(MovableExpert):
            async def load(self, *arguments: object) -> object:
                raise ResourceExhausted("no memory", reason=Reason.NO_ROOM)

        async def main() -> None:
            async with bench(MovableExpert(range(4), "a"), Full(range(4, 8), "b")) as test:
                await test.send(HOT, 200)
                with pytest.raises(ResourceExhausted, match="no memory"):
                    await test.pool.rebalancer.rebalance()
                assert all(holders(test.pool, layer, each) for layer in range(LAYERS) for each in range(8))
                assert test.pool.moves.under_way == []

        asyncio.run(main())


class TestSettings:
    def test_flags_reach_the_pool(self) -> None:
        settings = RouterSettings(rebalance="auto", rebalance_interval=5.0, rebalance_threshold=1.5)
        found = settings.pool_settings().rebalance
        assert (found.is_automatic, found.interval, found.threshold) == (True, 5.0, 1.5)
        assert not RouterSettings().pool_settings().rebalance.is_automatic

    @pytest.mark.parametrize("wrong", [{"rebalance_interval": 0.0}, {"rebalance_threshold": 0.9}])
    def test_what_cannot_be(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ConfigError, match="rebalance"):
            RouterSettings(**wrong)


class TestAutomatic:
    def test_it_moves_by_itself_and_then_rests(self) -> None:
        async def main() -> None:
            a, b = halves()
            async with bench(a, b, limits=dataclasses.replace(EAGER, is_automatic=True)) as test:
                await test.send(HOT, 200)
                test.pool.rebalancer.start(test.counter.rows_LE)
                await until(lambda: bool(a.told) and not test.pool.moves.under_way)
                await until(lambda: test.pool.rebalancer._pacing.is_resting(test.clock.now))
                told = len(a.told), len(b.told)
                await test.send([3, 7, 5], 400)
                await asyncio.sleep(5 * EAGER.interval)
                assert (len(a.told), len(b.told)) == told, "it rests"

        asyncio.run(main())

    def test_it_is_off_unless_asked_for(self) -> None:
        async def main() -> None:
            a, b = halves()
            async with bench(a, b) as test:
                await test.send(HOT, 200)
                test.pool.rebalancer.start(test.counter.rows_LE)
                await asyncio.sleep(5 * EAGER.interval)
                assert a.told == b.told == []

        asyncio.run(main())


@contextlib.asynccontextmanager
async def controlled(*links: MovableExpert) -> AsyncIterator[tuple[AsyncClient, Engine]]:
    """Control over a real server, and the engine behind it."""
    async with serving(attention_link(), links, ExpertPoolSettings(rebalance=EAGER)) as engine:
        server = RoleServer([ControlService(engine).as_service()])
        address = await server.start("127.0.0.1:0")
        try:
            async with AsyncClient(address, timeout=30, retries=0) as client:
                yield client, engine
        finally:
            await server.stop(0)


class TestControl:
    def test_moves_while_a_request_runs(self) -> None:
        async def main() -> None:
            async with controlled(*halves()) as (client, engine):
                before = await client.status()
                running = [asyncio.create_task(tokens_of(engine.submit(golden_request("len33")))) for _ in range(3)]
                cost = await client.move_experts(3, source="a", target="b")
                await client.move_experts([3, ExpertRange(4, 0, 1)], source="b", target="a")
                for task in running:
                    assert await task == golden_tokens("len33")
                status = await client.status()
                assert status.placement_version == cost.placement_version + 2
                assert status.placement_version > before.placement_version
                a, b = [worker for worker in status.workers if worker.address in "ab"]
                assert ExpertRange(4, 0, 1) in a.held
                assert ExpertRange(4, 1, LAYERS) in b.held
                assert status.moves == ()

        asyncio.run(main())

    def test_status_shows_what_is_under_way(self) -> None:
        async def main() -> None:
            a, b = halves()
            async with controlled(a, b) as (client, _):
                b.may_load.clear()
                move = asyncio.create_task(client.move_experts(3, source="a", target="b"))
                await until(lambda: bool(b.told))
                status = await client.status()
                (under_way,) = status.moves
                assert (under_way.source, under_way.target, under_way.phase) == ("a", "b", "loading")
                assert under_way.experts == (ExpertRange(3, 0, LAYERS),)
                assert [worker.loading for worker in status.workers if worker.address == "b"] == [under_way.experts]
                move.cancel()
                b.may_load.set()
                await until(lambda: ("unload", {(layer, 3) for layer in range(LAYERS)}) in a.told)

        asyncio.run(main())

    def test_refusals(self) -> None:
        async def main() -> None:
            async with controlled(*halves()) as (client, _):
                with pytest.raises(sdk.InvalidRequest) as caught:
                    await client.move_experts(9, source="a", target="b")
                assert caught.value.field == "experts[0].expert"
                with pytest.raises(sdk.NotFound):
                    await client.move_experts(0, source="a", target="nobody")
                with pytest.raises(sdk.FailedPrecondition) as last:
                    await client.move_experts(0, source="a")
                assert last.value.reason is Reason.LAST_HOLDER
                assert "fewer than" in (await client.rebalance_experts()).reason

        asyncio.run(main())

    def test_a_process_with_its_own_experts_has_nowhere_to_move_them(self) -> None:
        async def main() -> None:
            async with service() as served:
                for call in (served.client.move_experts(0, target="x"), served.client.rebalance_experts()):
                    with pytest.raises(sdk.FailedPrecondition, match="in this process"):
                        await call
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await served.control.MoveExperts(control_pb2.MoveExpertsRequest())
                assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION

        asyncio.run(main())
