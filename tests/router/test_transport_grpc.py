"""Links over gRPC against the real services: the values of the local path, and every way a stream can end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attention_worker.service import AttentionService
from expert_worker.engine import ExpertEngine
from expert_worker.service import ExpertService
from grokmoe import tensors
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import DeadlineExceeded, FailedPrecondition, InvalidRequest, Unavailable
from grokmoe.server import RoleServer
from grokmoe.step_plan import GREEDY, LogitsScope, SequenceChunk, StepPlan, StepResult, TokenSampling, TokenScoring
from grokmoe.telemetry import ExpertMetrics, new_registry
from launcher.serve import describe
from router.legs import Legs
from router.moe import LocalMoe, RowCounter
from router.transport import grpc_attention
from router.transport.base import AttentionLink
from router.transport.grpc_attention import GrpcAttentionLink
from router.transport.grpc_expert import GrpcExpertLink
from router.transport.local import LocalAttentionLink
from tests import goldens
from tests.router import tiny
from tests.router.tiny import CONFIG, attention_engine, expert_set, gates, until

pytestmark = pytest.mark.usefixtures("both_streams")


class FilledHole:
    """Fills holes with the experts of this process, after `before(layer)`."""

    is_local = False

    def __init__(self, before: Callable[[int], Any] | None = None) -> None:
        self._moe = LocalMoe(CONFIG, gates(), tiny.experts, RowCounter(CONFIG), Legs())
        self._before = before

    async def fill(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        if self._before is not None:
            await self._before(layer)
        return self.fill_now(layer, x_TD)

    def fill_now(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        return self._moe.fill_now(layer, x_TD)


def plan_for(incarnation: str) -> StepPlan:
    """Two sequences: one greedy that returns all logits, one that draws; with log-probabilities."""
    token_ids = goldens.PROMPTS["len33"]
    pages = range(-(-len(token_ids) // tiny.PAGE_SIZE))
    drawn = TokenSampling(temperature=0.7, top_k=50, top_p=0.9, seed=2**63, num_logprobs=3)
    chunks = (
        SequenceChunk(tuple(token_ids), 0, tuple(pages), GREEDY, LogitsScope.ALL),
        SequenceChunk((5, 6, 7), 0, (len(pages),), drawn, scoring=TokenScoring(0, (6, 7), 2)),
    )
    return StepPlan(incarnation, chunks)


async def step(link: AttentionLink, before: Callable[[int], Any] | None = None, lane: int = 0) -> StepResult:
    info = await link.describe()
    async with asyncio.timeout(tiny.TIMEOUT):
        return await link.step(lane, plan_for(info.incarnation), FilledHole(before), Legs())


@functools.cache
def expected() -> StepResult:
    engine = attention_engine()
    return asyncio.run(step(LocalAttentionLink(engine, describe(engine))))


def assert_as_expected(result: StepResult) -> None:
    assert (result.token_ids, result.logprobs) == (expected().token_ids, expected().logprobs)
    assert len(result.logprobs) == 2
    assert torch.equal(result.logits, expected().logits), "bit for bit"


@contextlib.asynccontextmanager
async def attention(path: Path) -> AsyncIterator[RoleServer]:
    server = RoleServer([AttentionService(attention_engine()).as_service()])
    await server.start(f"unix:{path}")
    try:
        yield server
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def linked(link: Any) -> AsyncIterator[Any]:
    try:
        yield link
    finally:
        await link.close()


@pytest.fixture
def address(tmp_path: Path) -> Path:
    expected()
    return tmp_path / "socket"


@pytest.fixture(params=[tensors.MAX_CHUNK_BYTES, 4000], ids=["whole", "cut"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests that use it run twice: large messages, and all payloads cut into parts of a few rows."""
    monkeypatch.setattr(tensors, "encode_rows", functools.partial(tensors.encode_rows, max_bytes=request.param))


class TestAttention:
    @pytest.mark.usefixtures("chunked")
    def test_values_are_those_of_the_local_path(self, address: Path) -> None:
        async def main() -> None:
            async with attention(address), linked(GrpcAttentionLink(f"unix:{address}")) as link:
                info = await link.describe()
                assert (info.config_hash, info.dtype) == (CONFIG.content_hash, torch.float32)
                assert (info.layer_begin, info.layer_end, info.page_size) == (0, 3, tiny.PAGE_SIZE)
                legs = Legs()
                result = await link.step(0, plan_for(info.incarnation), FilledHole(), legs)
                assert_as_expected(result)
                assert legs.seconds["attention"] > 0
                assert_as_expected(await step(link))

        asyncio.run(main())

    def test_lanes_do_not_wait_for_one_another(self, address: Path) -> None:
        async def main() -> None:
            both_in_hole, in_hole = asyncio.Event(), 0

            async def meet(layer: int) -> None:
                nonlocal in_hole
                in_hole += 1
                if in_hole == 2:
                    both_in_hole.set()
                await both_in_hole.wait()

            async with attention(address), linked(GrpcAttentionLink(f"unix:{address}")) as link:
                for result in await asyncio.gather(step(link, meet, lane=0), step(link, meet, lane=1)):
                    assert_as_expected(result)

        asyncio.run(main())

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            (lambda plan: StepPlan("another", plan.chunks), FailedPrecondition),
            (lambda plan: StepPlan(plan.incarnation, ()), InvalidRequest),
            (lambda plan: StepPlan(plan.incarnation, (*plan.chunks, SequenceChunk((9999,), 0, (9,)))), InvalidRequest),
        ],
    )
    def test_a_refused_plan(self, address: Path, change: Any, error: type[Exception]) -> None:
        async def main() -> None:
            async with attention(address), linked(GrpcAttentionLink(f"unix:{address}")) as link:
                plan = change(plan_for((await link.describe()).incarnation))
                with pytest.raises(error):
                    await link.step(0, plan, FilledHole(), Legs())
                assert_as_expected(await step(link))

        asyncio.run(main())

    def test_a_worker_killed_in_the_middle(self, address: Path) -> None:
        async def main() -> None:
            async with contextlib.AsyncExitStack() as stack:
                server = await stack.enter_async_context(attention(address))
                link = await stack.enter_async_context(linked(GrpcAttentionLink(f"unix:{address}")))
                first = await link.describe()

                async def kill(layer: int) -> None:
                    if layer == 1:
                        await server.stop(0)

                with pytest.raises(Unavailable):
                    await step(link, kill)
                with pytest.raises(Unavailable):
                    await link.step(0, plan_for(first.incarnation), FilledHole(), Legs())
                with pytest.raises(Unavailable):
                    await link.describe()
                await stack.enter_async_context(attention(address))
                async with asyncio.timeout(tiny.TIMEOUT):
                    while True:
                        with contextlib.suppress(Unavailable):
                            assert (await link.describe()).incarnation != first.incarnation
                            break
                assert_as_expected(await step(link))

        asyncio.run(main())

    def test_a_step_that_is_cancelled(self, address: Path) -> None:
        async def main() -> None:
            async with attention(address), linked(GrpcAttentionLink(f"unix:{address}")) as link:
                in_hole = asyncio.Event()

                async def wait(layer: int) -> None:
                    in_hole.set()
                    await asyncio.Event().wait()

                leaving = asyncio.create_task(step(link, wait))
                await in_hole.wait()
                leaving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await leaving
                assert_as_expected(await step(link))

        asyncio.run(main())

    def test_a_hole_that_cannot_be_filled(self, address: Path) -> None:
        async def main() -> None:
            async with attention(address), linked(GrpcAttentionLink(f"unix:{address}")) as link:

                async def fail(layer: int) -> None:
                    if layer == 2:
                        raise Unavailable("no expert")

                with pytest.raises(Unavailable, match="no expert"):
                    await step(link, fail)
                assert_as_expected(await step(link))

        asyncio.run(main())

    def test_a_worker_that_says_nothing_is_lost(self, address: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(grpc_attention, "HOLE_TIMEOUT", 0.05)
        go_on = threading.Event()

        async def main() -> None:
            async with attention(address), linked(GrpcAttentionLink(f"unix:{address}")) as link:
                info = await link.describe()
                tiny.device().post(lambda: go_on.wait(10))
                try:
                    with pytest.raises(Unavailable, match="no message from the attention worker"):
                        await link.step(0, plan_for(info.incarnation), FilledHole(), Legs())
                finally:
                    go_on.set()
                monkeypatch.setattr(grpc_attention, "HOLE_TIMEOUT", 30.0)
                assert_as_expected(await step(link))

        asyncio.run(main())


class SlowExperts:
    """A real expert service whose device can be held up."""

    def __init__(self, path: Path, max_rows: int = 100) -> None:
        metrics = ExpertMetrics(new_registry())
        self.device = DeviceThread("test-experts")
        self.service = ExpertService(ExpertEngine(expert_set(), metrics, self.device), metrics, max_rows)
        self.server = RoleServer([self.service.as_service()])
        self._path = path
        self._go_on = threading.Event()

    def hold(self) -> None:
        """Returns when the device is at it: what waits from now on are calls."""
        begun = threading.Event()

        def wait() -> None:
            begun.set()
            self._go_on.wait(10)

        self._go_on.clear()
        self.device.post(wait)
        begun.wait(10)

    def release(self) -> None:
        self._go_on.set()

    async def __aenter__(self) -> SlowExperts:
        await self.server.start(f"unix:{self._path}")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()
        await self.server.stop(0)
        self.device.stop()


def call_of(number: int) -> tuple[int, tuple[int, ...], tuple[int, ...], torch.Tensor]:
    """A call of a few rows, different for every number."""
    counts = (number % 4, 3, number % 3)
    random = torch.Generator().manual_seed(number)
    return number % 3, (0, 2, 7), counts, torch.randn(sum(counts), CONFIG.hidden_size, generator=random)


async def check_call(link: GrpcExpertLink, number: int, lane: int = 0) -> None:
    async with asyncio.timeout(tiny.TIMEOUT):
        reply = await link.forward(lane, *call_of(number))
    torch.testing.assert_close(reply.rows_ND, tiny.experts(*call_of(number)), atol=1e-5, rtol=1e-5)


class TestExperts:
    @pytest.mark.usefixtures("chunked")
    def test_values_are_those_of_the_local_path(self, address: Path) -> None:
        async def main() -> None:
            async with SlowExperts(address), linked(GrpcExpertLink(f"unix:{address}")) as link:
                info = await link.describe()
                assert info.experts == tuple((expert, 0, 3) for expert in range(8))
                assert (info.config_hash, info.dtype, info.max_rows) == (CONFIG.content_hash, torch.float32, 100)
                layer, expert_ids, counts, rows_ND = call_of(3)
                reply = await link.forward(0, layer, expert_ids, counts, rows_ND)
                assert torch.equal(reply.rows_ND, tiny.experts(layer, expert_ids, counts, rows_ND)), "bit for bit"
                assert reply.compute > 0
                await asyncio.gather(*(check_call(link, number, lane=number % 2) for number in range(20)))

        asyncio.run(main())

    def test_a_refused_call_leaves_the_others_alone(self, address: Path) -> None:
        async def main() -> None:
            async with SlowExperts(address) as worker, linked(GrpcExpertLink(f"unix:{address}")) as link:
                await check_call(link, 0)
                worker.hold()
                waiting = asyncio.create_task(check_call(link, 1))
                with pytest.raises(InvalidRequest) as caught:
                    await link.forward(0, 99, (0,), (1,), torch.zeros(1, CONFIG.hidden_size))
                assert caught.value.field == "layer"
                with pytest.raises(InvalidRequest, match="limit is 100"):
                    await link.forward(0, 0, (0,), (101,), torch.zeros(101, CONFIG.hidden_size))
                worker.release()
                await waiting

        asyncio.run(main())

    def test_a_worker_killed_in_the_middle(self, address: Path) -> None:
        async def main() -> None:
            async with linked(GrpcExpertLink(f"unix:{address}")) as link:
                async with SlowExperts(address) as worker:
                    await check_call(link, 0)
                    worker.hold()
                    calls = [asyncio.create_task(link.forward(0, *call_of(number))) for number in range(3)]
                    await until(lambda: worker.device.num_waiting == 3)
                    await worker.server.stop(0)
                    for outcome in await asyncio.gather(*calls, return_exceptions=True):
                        assert isinstance(outcome, Unavailable)
                with pytest.raises(Unavailable):
                    await link.forward(0, *call_of(1))
                async with SlowExperts(address):
                    async with asyncio.timeout(tiny.TIMEOUT):
                        while True:
                            with contextlib.suppress(Unavailable):
                                await link.describe()
                                break
                    await check_call(link, 1)

        asyncio.run(main())

    def test_a_lane_that_is_reset_owes_nothing(self, address: Path) -> None:
        async def main() -> None:
            async with SlowExperts(address) as worker, linked(GrpcExpertLink(f"unix:{address}")) as link:
                await check_call(link, 0)
                worker.hold()
                given_up = asyncio.create_task(link.forward(0, *call_of(1)))
                other_lane = asyncio.create_task(check_call(link, 2, lane=1))
                await until(lambda: worker.device.num_waiting == 2)
                link.reset(0)
                link.reset(7)
                with pytest.raises(Unavailable, match="closed"):
                    await given_up
                waiting = asyncio.create_task(check_call(link, 3))
                worker.release()
                await asyncio.gather(waiting, other_lane)

        asyncio.run(main())

    def test_a_call_without_time_to_begin(self, address: Path) -> None:
        async def main() -> None:
            async with SlowExperts(address) as worker, linked(GrpcExpertLink(f"unix:{address}")) as link:
                worker.hold()
                with pytest.raises(DeadlineExceeded, match="nobody waits"):
                    await link.forward(0, *call_of(1), timeout=0.05)
                worker.release()
                await check_call(link, 2)

        asyncio.run(main())

    def test_a_call_that_is_cancelled_leaves_the_others_alone(self, address: Path) -> None:
        async def main() -> None:
            async with SlowExperts(address) as worker, linked(GrpcExpertLink(f"unix:{address}")) as link:
                await check_call(link, 0)
                worker.hold()
                leaving, staying = (asyncio.create_task(check_call(link, number)) for number in (1, 2))
                await until(lambda: worker.device.num_waiting == 2)
                leaving.cancel()
                worker.release()
                await staying
                assert leaving.cancelled()

        asyncio.run(main())

    def test_a_stream_that_was_cancelled_under_its_callers(self, address: Path) -> None:
        """gRPC cancels a whole call when one of its writes is cancelled, such as by a time-out."""

        async def main() -> None:
            async with SlowExperts(address) as worker, linked(GrpcExpertLink(f"unix:{address}")) as link:
                await check_call(link, 0)
                worker.hold()
                waiting = asyncio.create_task(link.forward(0, *call_of(1)))
                await until(lambda: worker.device.num_waiting == 1)
                link._lanes[0]._stream.cancel()
                with pytest.raises(Unavailable):
                    await waiting
                worker.release()
                await check_call(link, 1)

        asyncio.run(main())

    def test_a_worker_that_leaves_is_noticed_without_a_call(self, address: Path) -> None:
        async def main() -> None:
            noticed: list[str] = []
            async with linked(GrpcExpertLink(f"unix:{address}")) as link:
                link.watch(noticed.append)
                async with SlowExperts(address):
                    await check_call(link, 0)
                    link.reset(0)
                    await check_call(link, 1)
                    assert not noticed, "what we end ourselves is no news"
                await until(lambda: bool(noticed))
            assert len(noticed) == 1

        asyncio.run(main())

    def test_nobody_at_the_address(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with linked(GrpcExpertLink(f"unix:{tmp_path}/nobody")) as link:
                with pytest.raises(Unavailable):
                    await link.describe()
                with pytest.raises(Unavailable):
                    await link.forward(0, *call_of(1))

        asyncio.run(main())
