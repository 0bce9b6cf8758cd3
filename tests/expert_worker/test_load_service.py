"""Load and Unload over a real server on a Unix socket, beside streams that go on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from expert_worker.engine import ExpertEngine
from expert_worker.service import ExpertService
from grokmoe.channel import open_channel
from grokmoe.errors import Code, GrokmoeError, InvalidRequest, Reason
from grokmoe.model_config import TINY
from grokmoe.security import SecuritySettings
from grokmoe.server import RoleServer
from grokmoe.status import from_rpc_error
from grokmoe.v1 import expert_pb2
from tests.expert_worker import test_loader
from tests.expert_worker.small_model import assert_near, draw, new_metrics, twin, until
from tests.expert_worker.test_loader import SlowReads, opened
from tests.expert_worker.test_service import NAME, Request, Stream

directory = test_loader.directory

HELD = frozenset({(0, 0), (0, 1), (1, 0)})
HASH = TINY.content_hash
PLACES = {
    "Describe": (expert_pb2.ExpertDescribeRequest, expert_pb2.ExpertDescribeResponse),
    "Load": (expert_pb2.ExpertLoadRequest, expert_pb2.ExpertLoadResponse),
    "Unload": (expert_pb2.ExpertUnloadRequest, expert_pb2.ExpertUnloadResponse),
}
Ranges = list[tuple[int, int, int]]


def ranges_of(message: Any) -> Ranges:
    return [(each.expert, each.layer_begin, each.layer_end) for each in message]


class Caller:
    """A router's view of the worker."""

    def __init__(self, world: test_loader.World, channel: grpc.aio.Channel, server: RoleServer, service: Any) -> None:
        self.world, self.channel, self.server, self.service = world, channel, server, service
        self._next_id = 0

    def call(self, method: str, asked: Ranges = (), config_hash: str = HASH, **options: Any) -> Any:  # type: ignore[assignment]
        """The call, not awaited."""
        request, response = PLACES[method]
        ranges = [expert_pb2.ExpertRange(expert=e, layer_begin=begin, layer_end=end) for e, begin, end in asked]
        message = request() if method == "Describe" else request(config_hash=config_hash, experts=ranges)
        stub: Any = self.channel.unary_unary(
            f"/{NAME}/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        return stub(message, **options)

    async def error(self, *args: Any, **options: Any) -> GrokmoeError:
        with pytest.raises(grpc.RpcError) as raised:
            await self.call(*args, **options)
        return from_rpc_error(raised.value)

    def stream(self) -> Stream:
        return Stream(self.channel)

    async def send(self, stream: Stream, layer: int, ids: list[int], rows_ND: torch.Tensor) -> None:
        """One call; its rows are shared evenly."""
        self._next_id += 1
        counts = [len(rows_ND) // len(ids)] * len(ids)
        await stream.send(Request(request_id=self._next_id, layer=layer, expert_ids=ids, counts=counts), rows_ND)

    async def forward(self, stream: Stream, layer: int, ids: list[int], rows_ND: torch.Tensor) -> torch.Tensor:
        await self.send(stream, layer, ids, rows_ND)
        header, out_ND = await stream.receive()
        assert not header.HasField("failure"), header.failure
        assert 1 <= header.revision <= self.world.experts.holdings.revision
        assert out_ND is not None
        return out_ND

    async def failure(self, stream: Stream, layer: int, ids: list[int]) -> Any:
        await self.send(stream, layer, ids, draw(len(ids)))
        header, _ = await stream.receive()
        assert header.revision == self.world.experts.holdings.revision
        return header.failure


@pytest.fixture
def play(directory: Path, tmp_path: Path) -> Callable[..., None]:
    """Runs a scenario against a fresh worker that holds HELD."""

    @contextlib.asynccontextmanager
    async def caller(is_ready: bool, has_loader: bool, **options: Any) -> AsyncIterator[Caller]:
        metrics, _ = new_metrics()
        async with opened(options.pop("held", HELD), **options) as world:
            engine = ExpertEngine(world.experts, metrics, world.device)
            service = ExpertService(engine, metrics, 100, lambda: is_ready, world.loader if has_loader else None)
            server = RoleServer([service.as_service()])
            address = await server.start(f"unix:{tmp_path}/socket")
            try:
                async with open_channel(address) as channel:
                    yield Caller(world, channel, server, service)
            finally:
                await server.stop(0)

    def run(
        scenario: Callable[[Caller], Awaitable[None]], is_ready: bool = True, has_loader: bool = True, **options: Any
    ) -> None:
        async def main() -> None:
            async with caller(is_ready, has_loader, **options) as it:
                await scenario(it)

        asyncio.run(main())

    return run


def test_a_load_and_what_is_described(play: Any, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(caller: Caller) -> None:
        before = await caller.call("Describe")
        assert ranges_of(before.experts) == [(0, 0, 2), (1, 0, 1)]
        assert (before.revision, before.capacity, ranges_of(before.loading)) == (1, 7, [])
        assert before.expert_bytes == 3 * TINY.hidden_size * TINY.intermediate_size * 4
        slow = SlowReads(caller.world, monkeypatch)
        loading = caller.call("Load", [(0, 0, 2), (1, 0, 2), (5, 0, 2)])
        await until(lambda: slow.num_reads == 1)
        meanwhile = await caller.call("Describe")
        assert ranges_of(meanwhile.experts) == [(0, 0, 2), (1, 0, 1)]
        assert ranges_of(meanwhile.loading) == [(1, 1, 2), (5, 0, 2)]
        assert meanwhile.revision == 1
        slow.go_on.set()
        loaded = await loading
        assert loaded.revision == 2
        assert loaded.loaded_bytes == 3 * before.expert_bytes
        assert loaded.load_ns > 0
        after = await caller.call("Describe")
        assert ranges_of(after.experts) == [(0, 0, 2), (1, 0, 2), (5, 0, 2)]
        assert (after.revision, ranges_of(after.loading)) == (2, [])
        rows_ND = draw(6)
        out_ND = await caller.forward(caller.stream(), 1, [0, 1, 5], rows_ND)
        assert_near(out_ND, twin(directory, 1, [0, 1, 5], [2, 2, 2], rows_ND))
        again = await caller.call("Load", [(5, 0, 2)])
        assert (again.revision, again.loaded_bytes) == (2, 0)

    play(scenario, capacity=7)


def test_what_is_given_up_is_served_for_a_while(play: Any, directory: Path) -> None:
    async def scenario(caller: Caller) -> None:
        stream, rows_ND = caller.stream(), draw(2)
        expected_ND = await caller.forward(stream, 0, [0, 1], rows_ND)
        given_up = await caller.call("Unload", [(1, 0, 2), (7, 0, 2)])
        assert given_up.revision == 2
        assert ranges_of((await caller.call("Describe")).experts) == [(0, 0, 2)]
        assert torch.equal(await caller.forward(stream, 0, [0, 1], rows_ND), expected_ND)
        assert (await caller.call("Unload", [(1, 0, 2)])).revision == 2, "it is not held any more"

        await caller.world.pass_time()
        failure = await caller.failure(stream, 0, [0, 1])
        assert (failure.code, failure.reason) == (Code.FAILED_PRECONDITION, Reason.EXPERT_NOT_HELD)
        assert "expert 1 of layer 0" in failure.message
        failure = await caller.failure(stream, 0, [0, 8])
        assert (failure.code, failure.field) == (Code.INVALID_ARGUMENT, "expert_ids")
        assert torch.equal((await caller.forward(stream, 0, [0], rows_ND[:1])), expected_ND[:1])

        assert (await caller.call("Load", [(1, 0, 1)])).loaded_bytes > 0
        assert torch.equal(await caller.forward(stream, 0, [0, 1], rows_ND), expected_ND)

    play(scenario)


def test_wanted_again_before_its_time_is_up(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(caller: Caller) -> None:
        SlowReads(caller.world, monkeypatch)  # any read would hang
        await caller.call("Unload", [(0, 0, 2), (1, 0, 1)])
        assert not (await caller.call("Describe")).experts
        back = await caller.call("Load", [(0, 0, 2)])
        assert (back.revision, back.loaded_bytes) == (3, 0)
        await caller.world.pass_time()
        assert caller.world.resident == {(0, 0), (1, 0)}

    play(scenario)


def test_calls_in_flight_when_their_experts_go(play: Any, directory: Path) -> None:
    """Also after the time is up: a call that was read is answered."""

    async def scenario(caller: Caller) -> None:
        stream, rows_ND, go_on = caller.stream(), draw(4), threading.Event()
        caller.world.device.post(go_on.wait)
        sent = 3
        for _ in range(sent):
            await caller.send(stream, 0, [0, 1], rows_ND)
        await until(lambda: len(caller.service._engine._waiting) == sent)
        await caller.call("Unload", [(0, 0, 2), (1, 0, 1)])
        caller.world.clock.now += 100
        caller.world.loader.unload(frozenset())
        await until(lambda: not caller.world.resident)
        go_on.set()
        for _ in range(sent):
            header, out_ND = await stream.receive()
            assert not header.HasField("failure"), header.failure
            assert out_ND is not None
            assert_near(out_ND, twin(directory, 0, [0, 1], [2, 2], rows_ND))
            assert header.revision == 2

    play(scenario)


def test_traffic_goes_on_through_loads_and_unloads(play: Any) -> None:
    """Three callers in a closed loop, in both layers; every answer has the same bits all the way."""

    async def scenario(caller: Caller) -> None:
        is_over = False
        num_answers = [0, 0, 0]

        async def ask(number: int) -> None:
            stream, rows_ND, layer = caller.stream(), draw(1 + number, seed=number), number % 2
            expected_ND = await caller.forward(stream, layer, [0], rows_ND)
            while not is_over:
                assert torch.equal(await caller.forward(stream, layer, [0], rows_ND), expected_ND)
                num_answers[number] += 1

        async with asyncio.TaskGroup() as asking:
            for number in range(3):
                asking.create_task(ask(number))
            for _ in range(5):
                before = list(num_answers)
                await caller.call("Load", [(2, 0, 2), (7, 0, 2)])
                await caller.call("Unload", [(2, 0, 2), (7, 0, 1)])
                await caller.world.pass_time()
                await until(lambda before=before: all(map(int.__gt__, num_answers, before)))
            is_over = True
        assert caller.world.resident == {*HELD, (1, 7)}

    play(scenario)


@pytest.mark.parametrize("how", ["cancelled", "too late"])
def test_a_caller_that_leaves(play: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    async def scenario(caller: Caller) -> None:
        slow = SlowReads(caller.world, monkeypatch, after=3)  # in the middle: one expert of one layer is there
        loading = caller.call("Load", [(5, 0, 2)], timeout=1.0 if how == "too late" else 20)
        await until(lambda: slow.num_reads == 4)
        assert caller.world.resident == {*HELD, (0, 5)}
        if how == "cancelled":
            loading.cancel()
        with pytest.raises((asyncio.CancelledError, grpc.RpcError)):
            await loading
        await until(lambda: all(stop.is_set() for stop in caller.world.loader._stops))
        slow.go_on.set()
        await caller.world.settle()
        assert caller.world.resident == HELD
        described = await caller.call("Describe")
        assert (described.revision, ranges_of(described.loading)) == (1, [])
        assert (await caller.call("Load", [(5, 0, 2)])).revision == 2

    play(scenario)


@pytest.mark.parametrize(
    ("asked", "field"),
    [([], "experts"), ([(0, 0, 2), (0, 0, 3)], "experts[1].layer_end"), ([(2**32 - 1, 0, 1)], "experts[0].expert")],
    ids=str,
)
@pytest.mark.parametrize("method", ["Load", "Unload"])
def test_a_bad_request(play: Any, method: str, asked: Ranges, field: str) -> None:
    async def scenario(caller: Caller) -> None:
        error = await caller.error(method, asked)
        assert isinstance(error, InvalidRequest)
        assert error.field == field

    play(scenario)


@pytest.mark.parametrize("method", ["Load", "Unload"])
def test_another_model(play: Any, method: str) -> None:
    async def scenario(caller: Caller) -> None:
        assert (await caller.error(method, [(0, 0, 1)], config_hash="another")).code is Code.FAILED_PRECONDITION
        assert ranges_of((await caller.call("Describe")).experts) == [(0, 0, 2), (1, 0, 1)]

    play(scenario)


def test_no_room(play: Any) -> None:
    async def scenario(caller: Caller) -> None:
        error = await caller.error("Load", [(1, 0, 2), (2, 0, 2)])
        assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, Reason.NO_ROOM)
        assert (await caller.call("Load", [(1, 0, 2)])).revision == 2

    play(scenario, capacity=4)


@pytest.mark.parametrize("method", ["Load", "Unload"])
def test_a_worker_that_is_not_there_for_it(play: Any, method: str) -> None:
    async def refused(caller: Caller) -> None:
        assert (await caller.error(method, [(0, 0, 1)])).code is Code.UNAVAILABLE

    async def draining(caller: Caller) -> None:
        caller.service.drain()
        error = await caller.error(method, [(0, 0, 1)])
        assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.SHUTTING_DOWN)

    async def fixed(caller: Caller) -> None:
        assert (await caller.error(method, [(0, 0, 1)])).code is Code.FAILED_PRECONDITION

    play(refused, is_ready=False)
    play(draining)
    play(fixed, has_loader=False)


def test_draining_in_the_middle_of_a_load(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(caller: Caller) -> None:
        slow = SlowReads(caller.world, monkeypatch)
        loading = asyncio.ensure_future(caller.error("Load", [(5, 0, 2)]))
        await until(lambda: slow.num_reads == 1)
        stopping = asyncio.ensure_future(caller.server.stop(10))
        slow.go_on.set()
        error = await loading
        assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.SHUTTING_DOWN)
        await stopping

    play(scenario)


def test_a_worker_that_holds_nothing(play: Any, directory: Path) -> None:
    async def scenario(caller: Caller) -> None:
        stream = caller.stream()
        assert not (await caller.call("Describe")).experts
        assert (await caller.failure(stream, 0, [3])).reason == Reason.EXPERT_NOT_HELD
        await caller.call("Load", [(3, 0, 1)])
        rows_ND = draw(2)
        assert_near(await caller.forward(stream, 0, [3], rows_ND), twin(directory, 0, [3], [2], rows_ND))

    play(scenario, held=())


def test_only_the_cluster_may(directory: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("router:cluster:cluster-0123456789abcdef\nalice:inference+control:client-0123456789abcdef\n")

    async def main() -> None:
        async with opened(HELD) as world:
            metrics, _ = new_metrics()
            service = ExpertService(
                ExpertEngine(world.experts, metrics, world.device), metrics, 100, loader=world.loader
            )
            server = RoleServer([service.as_service()], SecuritySettings(tokens_file=str(tokens)))
            address = await server.start(f"unix:{tmp_path}/socket")
            try:
                async with open_channel(address) as channel:
                    caller = Caller(world, channel, server, service)
                    alice = [("authorization", "Bearer client-0123456789abcdef")]
                    for method in ("Load", "Unload"):
                        assert (await caller.error(method, [(0, 0, 2)])).code is Code.UNAUTHENTICATED
                        error = await caller.error(method, [(0, 0, 2)], metadata=alice)
                        assert error.code is Code.PERMISSION_DENIED
                    assert world.experts.holdings.revision == 1
                    router = [("authorization", "Bearer cluster-0123456789abcdef")]
                    assert (await caller.call("Unload", [(0, 0, 2)], metadata=router)).revision == 2
            finally:
                await server.stop(0)

    asyncio.run(main())
