"""Pipelines of stages behind real servers: what travels between them, who has their pages, what ends their streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from grokmoe import tensors
from grokmoe.errors import Unavailable
from router.engine import Engine
from router.transport.grpc_attention import GrpcAttentionLink, attention_link
from router.transport.pipeline import PipelineLink
from router.worker_state import WorkerState
from tests.router import tiny
from tests.router.test_cell_faults import ALL, check_all
from tests.router.test_transport_grpc_attention import CARE, Worker
from tests.router.tiny import golden_request, golden_tokens, serving, tokens_of, until

pytestmark = pytest.mark.usefixtures("both_streams")


@contextlib.asynccontextmanager
async def stages(path: Path, *cuts: int, names: str = "abc", **options: Any) -> AsyncIterator[list[Worker]]:
    """One server per stage."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(Worker(path, name, held=range(begin, end), **options))
            for name, begin, end in zip(names, cuts, cuts[1:], strict=False)
        ]


def joined(workers: list[Worker]) -> str:
    """As it is named in a list of addresses; not in the order of the layers."""
    return "+".join(worker.address for worker in reversed(workers))


@contextlib.asynccontextmanager
async def router(*addresses: str, experts: Any = None, **faults: Any) -> AsyncIterator[Engine]:
    links = [attention_link(address) for address in addresses]
    experts = experts or [tiny.ExpertDouble()]
    async with serving(links, experts, faults={"care": CARE, **faults}, max_step_tokens=24) as engine:
        yield engine


@pytest.mark.parametrize("cuts", [(0, 1, 2, 3), (0, 2, 3), (0, 1, 3)])
def test_the_golden_tokens(tmp_path: Path, cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states in many messages, as those of a long prefill are."""
    monkeypatch.setattr(tensors.encode_rows, "__defaults__", (5 * 4 * tiny.CONFIG.hidden_size,))

    async def main() -> None:
        async with stages(tmp_path, *cuts) as workers, router(joined(workers)) as engine:
            await check_all(engine)
            info = engine.cells[0].info
            assert info is not None
            assert [stage.address for stage in info.stages] == [worker.address for worker in workers]

    asyncio.run(main())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_that_stops_under_load_loses_nothing_and_comes_back_alone(tmp_path: Path, stage: int) -> None:
    async def main() -> None:
        async with (
            stages(tmp_path, 0, 1, 2, 3) as leaving,
            Worker(tmp_path, "other") as other,
            router(joined(leaving), other.address) as engine,
        ):
            asked = [(prompt, engine.submit(golden_request(prompt))) for prompt in [*ALL, *ALL]]
            await until(lambda: engine.report.num_steps >= 4)
            await leaving[stage].server.stop(5)
            for prompt, generation in asked:
                assert await tokens_of(generation) == golden_tokens(prompt)
            before = [worker.engine.incarnation for worker in leaving]
            await leaving[stage].start()
            await until(lambda: engine.cells[0].state is WorkerState.READY)
            after = [worker.engine.incarnation for worker in leaving]
            assert [old != new for old, new in zip(before, after, strict=True)] == [n == stage for n in range(3)]
            await check_all(engine)

    asyncio.run(main())


def test_a_stage_that_drains_between_steps_moves_nobody_twice(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            stages(tmp_path, 0, 1, 3) as leaving,
            Worker(tmp_path, "other") as other,
            router(joined(leaving), other.address, max_migrations=0) as engine,
        ):
            asked = [(prompt, engine.submit(golden_request(prompt))) for prompt in [*ALL, *ALL]]
            await until(lambda: engine.report.num_steps >= 4)
            leaving[1].service.drain()
            for prompt, generation in asked:
                assert await tokens_of(generation) == golden_tokens(prompt)
            await until(lambda: engine.cells[0].state is WorkerState.DRAINING)
            assert (engine.faults.losses, engine.faults.migrations) == (0, 0)

    asyncio.run(main())


def test_routers_that_want_the_same_stages_do_not_wait_for_one_another(tmp_path: Path) -> None:
    """One of them gets all: each asks for the same stage first, and for no other while it has not that one."""

    async def main() -> None:
        async with stages(tmp_path, 0, 1, 2, 3, release=30.0) as workers:
            addresses = [worker.address for worker in workers]
            orders = [addresses, addresses[::-1], [addresses[1], addresses[0], addresses[2]]]
            links = [PipelineLink([GrpcAttentionLink(address) for address in order]) for order in orders]
            outcomes = await asyncio.gather(*(link.describe() for link in links), return_exceptions=True)
            refused = [outcome for outcome in outcomes if isinstance(outcome, Unavailable)]
            assert len(refused) == len(links) - 1
            assert all(error.message.startswith(f"{addresses[0]}: UNAVAILABLE: leased by router ") for error in refused)
            for link in links:
                await link.close()

    asyncio.run(main())


def test_a_router_that_rests_keeps_the_lease_of_every_stage(tmp_path: Path) -> None:
    async def main() -> None:
        async with stages(tmp_path, 0, 1, 2, 3) as workers, router(joined(workers)) as engine:
            others = [GrpcAttentionLink(worker.address) for worker in workers]
            for _ in range(40):  # twice the time after which they would be free
                await asyncio.sleep(0.01)
                for other in others:
                    with pytest.raises(Unavailable, match="leased by router"):
                        await other.describe()
            assert await tokens_of(engine.submit(golden_request("len1"))) == golden_tokens("len1")
            for other in others:
                await other.close()

    asyncio.run(main())


class Stuck(tiny.ExpertDouble):
    """Experts that do not answer for one layer."""

    at: int | None = None

    async def forward(self, lane: int, layer: int, *call: Any, **options: Any) -> Any:
        if layer == self.at:
            await asyncio.Event().wait()
        return await super().forward(lane, layer, *call, **options)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_step_that_nobody_wants_any_more_is_over_in_every_stage(tmp_path: Path, layer: int) -> None:
    """The stream of the stage in which it was is closed; those of the others rest between two steps and are kept."""

    async def main() -> None:
        experts = Stuck()
        async with stages(tmp_path, 0, 1, 2, 3) as workers, router(joined(workers), experts=[experts]) as engine:
            await check_all(engine, ["len7"])
            experts.at = layer
            generation = engine.submit(golden_request("len33"))

            def running() -> list[bool]:
                return [any(lane._run is not None for lane in worker.service._lanes) for worker in workers]

            await until(lambda: running() == [number == layer for number in range(3)])
            engine.cancel(generation)
            await until(lambda: not any(running()))
            experts.at = None
            await check_all(engine)

    asyncio.run(main())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_worker_of_another_make_is_refused_by_name(tmp_path: Path, stage: int) -> None:
    async def main() -> None:
        async with stages(tmp_path, 0, 1, 2, 3) as workers:
            await workers[stage].server.stop(0)
            workers[stage]._sizes["page_size"] = 4
            await workers[stage].start()
            with pytest.raises(Exception, match=r"has page_size [48], unix:.* has [48]"):
                async with router(joined(workers)):
                    pass

    asyncio.run(main())
