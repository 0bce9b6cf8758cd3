"""Attention workers behind real servers that drain, and the lease of their pages when routers come and go."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from attention_worker.lease import Lease
from attention_worker.service import AttentionService
from grokmoe.errors import FailedPrecondition, Reason, Unavailable
from grokmoe.server import RoleServer
from grokmoe.step_plan import GREEDY, SequenceChunk, StepPlan
from router.attention_member import CellSettings
from router.engine import Engine
from router.legs import Legs
from router.probing import ProbeSettings
from router.transport.grpc_attention import GrpcAttentionLink
from router.worker_state import WorkerState
from tests import goldens
from tests.router import tiny
from tests.router.tiny import attention_engine, golden_request, golden_tokens, serving, tokens_of, until

CARE = CellSettings(heartbeat=0.05, probe=ProbeSettings(first_pause=0.01, max_pause=0.05))
ALL = [*goldens.PROMPTS]

pytestmark = pytest.mark.usefixtures("both_streams")


class Worker:
    """An attention worker's server on a Unix socket. sizes: of its engine."""

    def __init__(self, path: Path, name: str = "a", release: float = 0.2, **sizes: Any) -> None:
        self.address = f"unix:{path}/{name}"
        self._release, self._sizes = release, sizes

    async def start(self) -> Worker:
        self.engine = attention_engine(**self._sizes)
        self.service = AttentionService(self.engine, Lease(self.engine.incarnation, 30.0, self._release))
        self.server = RoleServer([self.service.as_service()])
        await self.server.start(self.address)
        return self

    async def __aenter__(self) -> Worker:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop(0)


@contextlib.asynccontextmanager
async def router(*workers: Worker, **faults: Any) -> AsyncIterator[Engine]:
    links = [GrpcAttentionLink(worker.address) for worker in workers]
    async with serving(links, [tiny.ExpertDouble()], faults={"care": CARE, **faults}, max_step_tokens=24) as engine:
        yield engine


def test_a_link_that_rests_is_told_why_its_stream_has_ended(tmp_path: Path) -> None:
    async def main() -> None:
        async with Worker(tmp_path) as worker, router(worker) as engine:
            assert await tokens_of(engine.submit(golden_request("len1"))) == golden_tokens("len1")
            link, info = engine.cells[0].link, engine.cells[0].info
            assert info is not None
            worker.service.drain()
            assert (await link.describe()).is_draining
            await until(lambda: engine.cells[0].state is WorkerState.DRAINING)

    asyncio.run(main())


def test_a_worker_that_stops_under_load_loses_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        leaving, other = Worker(tmp_path, "a"), Worker(tmp_path, "b")
        async with leaving, other, router(leaving, other, max_migrations=0) as engine:
            asked = [(prompt, engine.submit(golden_request(prompt))) for prompt in [*ALL, *ALL]]
            await until(lambda: engine.report.num_steps >= 4)
            await leaving.server.stop(5)
            for prompt, generation in asked:
                assert await tokens_of(generation) == golden_tokens(prompt)
            assert engine.faults.migrations == 0
            await leaving.start()
            await until(lambda: engine.cells[0].state is WorkerState.READY)

    asyncio.run(main())


def test_the_reason_of_a_stream_that_ended_while_it_rested(tmp_path: Path) -> None:
    async def main() -> None:
        async with Worker(tmp_path) as worker:
            link = GrpcAttentionLink(worker.address)
            info = await link.describe()
            engine_plan = _plan(info.incarnation)
            await link.step(0, engine_plan, _Hole(), Legs())
            worker.service.drain()
            (stream,) = link._lanes.values()
            async with asyncio.timeout(tiny.TIMEOUT):
                await stream._call.code()
            with pytest.raises(Unavailable) as caught:
                await link.step(0, engine_plan, _Hole(), Legs())
            assert caught.value.reason is Reason.SHUTTING_DOWN
            await link.close()

    asyncio.run(main())


def test_a_stream_that_rested_while_its_worker_was_replaced_is_not_used_again(tmp_path: Path) -> None:
    async def main() -> None:
        worker = Worker(tmp_path)
        async with worker:
            link = GrpcAttentionLink(worker.address)
            info = await link.describe()
            for lane in (0, 1):
                await link.step(lane, _plan(info.incarnation), _Hole(), Legs())
        async with worker:
            async with asyncio.timeout(tiny.TIMEOUT):
                while True:
                    with contextlib.suppress(Unavailable):
                        replaced = await link.describe()
                        break
                    await asyncio.sleep(0.02)
            assert replaced.incarnation != info.incarnation
            for lane in (1, 0):
                result = await link.step(lane, _plan(replaced.incarnation), _Hole(), Legs())
                assert len(result.token_ids) == 1
            await link.close()

    asyncio.run(main())


def test_a_router_that_was_killed_is_replaced_in_a_moment(tmp_path: Path) -> None:
    async def main() -> None:
        async with Worker(tmp_path) as worker:
            async with router(worker) as first:
                generation = first.submit(golden_request("len33", max_tokens=300))
                await until(lambda: generation.sequences[0].num_outputs > 2)
                second = GrpcAttentionLink(worker.address)
                with pytest.raises(Unavailable) as caught:
                    await second.describe()
                assert f"leased by router {first.cells[0].link.router_id}" in caught.value.message  # type: ignore[attr-defined]
                first.cancel(generation)
            before = worker.engine.incarnation
            async with router(worker) as third:
                assert worker.engine.incarnation != before
                assert await tokens_of(third.submit(golden_request("len33"))) == golden_tokens("len33")
                with pytest.raises(Unavailable, match="leased by router"):
                    await second.describe()
            await second.close()

    asyncio.run(main())


def test_a_router_that_rests_keeps_its_lease(tmp_path: Path) -> None:
    async def main() -> None:
        async with Worker(tmp_path) as worker, router(worker) as engine:
            other = GrpcAttentionLink(worker.address)
            for _ in range(40):  # twice the time after which it would be free
                await asyncio.sleep(0.01)
                with pytest.raises(Unavailable, match="leased by router"):
                    await other.describe()
            assert engine.cells[0].state is WorkerState.READY
            assert await tokens_of(engine.submit(golden_request("len1"))) == golden_tokens("len1")
            await other.close()

    asyncio.run(main())


def test_a_router_whose_pages_went_to_another_keeps_its_requests(tmp_path: Path) -> None:
    """It was silent for too long. Its sequences wait until the worker is free again; nobody takes it by force."""

    async def main() -> None:
        async with Worker(tmp_path, release=1.0) as worker, router(worker, max_migrations=1) as engine:
            generation = engine.submit(golden_request("len33", max_tokens=16))
            await until(lambda: generation.sequences[0].num_outputs > 2)
            worker.service._lease._heard -= 1000.0
            worker.service._claim("thief")
            thief = GrpcAttentionLink(worker.address, "thief")
            stolen = await thief.describe()
            await until(lambda: engine.cells[0].state is WorkerState.SUSPECT)
            for _ in range(3):
                assert await thief.describe() == stolen, "the first one does not take it back"
            await thief.close()
            assert await tokens_of(generation) == golden_tokens("len33")
            with pytest.raises(FailedPrecondition) as caught:
                worker.engine.begin(_plan(stolen.incarnation))
            assert caught.value.reason is Reason.WRONG_INCARNATION

    asyncio.run(main())


class _Hole:
    """Answers with what it gets: what comes out is of no interest."""

    is_local = False

    async def fill(self, layer: int, x_TD: Any) -> Any:
        return x_TD

    def fill_now(self, layer: int, x_TD: Any) -> Any:
        return x_TD


def _plan(incarnation: str) -> Any:
    return StepPlan(incarnation, (SequenceChunk((1, 2, 3), 0, (0,), GREEDY),))
