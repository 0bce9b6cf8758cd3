"""grokmoe.v1.Expert over a real server on a Unix socket, with a client that sends raw messages."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from expert_worker import forward_stream
from expert_worker.engine import ExpertEngine
from expert_worker.experts import ExpertSet
from expert_worker.service import ExpertService
from grokmoe import tensors
from grokmoe.channel import open_channel
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import Code, GrokmoeError, InvalidRequest, Reason
from grokmoe.model_config import TINY
from grokmoe.server import RoleServer
from grokmoe.status import from_rpc_error
from grokmoe.v1 import expert_pb2, tensor_pb2
from tests.expert_worker.small_model import (
    HELD,
    assert_near,
    device_thread,
    draw,
    load,
    new_metrics,
    twin,
    until,
    write,
)

MAX_ROWS = 2000
NAME = "grokmoe.v1.Expert"
Request = expert_pb2.ForwardRequest


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def experts(directory: Path) -> ExpertSet:
    return load(directory, held={0: (0, 1, 4), 1: HELD[1]})


class Stream:
    """One Forward stream: raw bytes out, decoded answers in."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call: Any = channel.stream_stream(f"/{NAME}/Forward")()
        self._answers: tensors.RowAssembler[expert_pb2.ForwardResponse] = tensors.RowAssembler(
            expert_pb2.ForwardResponse, "request_id", 1 << 20
        )

    async def send(self, header: expert_pb2.ForwardRequest, rows_ND: torch.Tensor, max_bytes: int = 1 << 20) -> None:
        for message in tensors.encode_rows(header, rows_ND, "request_id", max_bytes):
            await self.call.write(message)

    async def receive(self) -> tuple[expert_pb2.ForwardResponse, torch.Tensor | None]:
        while True:
            data = await self.call.read()
            assert data is not grpc.aio.EOF, "the stream ended"
            answer = self._answers.add(data)
            if answer is not None:
                return answer

    async def error(self) -> GrokmoeError:
        """The error that ends the stream."""
        try:
            while await self.call.read() is not grpc.aio.EOF:
                pass
        except grpc.RpcError as error:
            return from_rpc_error(error)
        raise AssertionError("the stream ended without an error")


@dataclasses.dataclass
class World:
    channel: grpc.aio.Channel
    directory: Path
    device: DeviceThread
    server: RoleServer
    service: ExpertService
    sample: Callable[..., float]

    def stream(self) -> Stream:
        return Stream(self.channel)

    async def assert_usable(self, stream: Stream, request_id: int = 99) -> None:
        rows_ND = draw(3)
        await stream.send(Request(request_id=request_id, layer=0, expert_ids=[1, 4], counts=[1, 2]), rows_ND)
        header, out_ND = await stream.receive()
        assert header.request_id == request_id
        assert not header.HasField("failure"), header.failure
        assert out_ND is not None
        assert_near(out_ND, twin(self.directory, 0, [1, 4], [1, 2], rows_ND))


@pytest.fixture
def play(directory: Path, experts: ExpertSet, tmp_path: Path) -> Callable[..., None]:
    """Runs a scenario against a fresh server."""

    @contextlib.asynccontextmanager
    async def world(device: DeviceThread, is_ready: bool) -> AsyncIterator[World]:
        metrics, registry = new_metrics()
        engine = ExpertEngine(experts, metrics, device)
        service = ExpertService(engine, metrics, MAX_ROWS, lambda: is_ready)
        server = RoleServer([service.as_service()])
        address = await server.start(f"unix:{tmp_path}/socket")
        await server.set_ready(is_ready)

        def sample(name: str, **labels: str) -> float:
            return registry.get_sample_value(f"grokmoe_expert_worker_{name}", labels) or 0.0

        try:
            async with open_channel(address) as channel:
                yield World(channel, directory, device, server, service, sample)
        finally:
            await server.stop(0)

    def run(scenario: Callable[[World], Awaitable[None]], is_ready: bool = True) -> None:
        async def main() -> None:
            with device_thread() as device:
                async with asyncio.timeout(20), world(device, is_ready) as it:
                    await scenario(it)

        asyncio.run(main())

    return run


def test_describe(play: Any, experts: ExpertSet) -> None:
    async def scenario(world: World) -> None:
        describe = world.channel.unary_unary(
            f"/{NAME}/Describe", response_deserializer=expert_pb2.ExpertDescribeResponse.FromString
        )
        reply = await describe(b"")
        assert reply.config_hash == TINY.content_hash
        assert reply.incarnation
        assert reply.dtype == tensor_pb2.DATA_TYPE_FLOAT32
        assert reply.hidden_size == TINY.hidden_size
        assert reply.max_rows == MAX_ROWS
        assert reply.device == "cpu"
        held = [(each.expert, each.layer_begin, each.layer_end) for each in reply.experts]
        assert held == [(0, 0, 2), (1, 0, 2), (2, 1, 2), (3, 1, 2), (4, 0, 2), (5, 1, 2), (6, 1, 2), (7, 1, 2)]

    play(scenario)


def test_health_and_reflection(play: Any) -> None:
    async def scenario(world: World) -> None:
        health = health_pb2_grpc.HealthStub(world.channel)
        status = await health.Check(health_pb2.HealthCheckRequest(service=NAME))
        assert status.status == health_pb2.HealthCheckResponse.SERVING
        reflect = reflection_pb2_grpc.ServerReflectionStub(world.channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        names = [service.name async for reply in reflect for service in reply.list_services_response.service]
        assert NAME in names

    play(scenario)


def test_not_ready(play: Any) -> None:
    async def scenario(world: World) -> None:
        assert (await world.stream().error()).code is Code.UNAVAILABLE
        with pytest.raises(grpc.RpcError) as raised:
            await world.channel.unary_unary(f"/{NAME}/Describe")(b"")
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE

    play(scenario, is_ready=False)


@pytest.mark.parametrize(
    ("layer", "ids", "counts"),
    [(0, [0, 1, 4], [1, 0, 2]), (1, [7], [9]), (1, [0, 7], [1, 0]), (0, [0, 4], [0, 0]), (0, [], [])],
)
def test_forward(play: Any, layer: int, ids: list[int], counts: list[int]) -> None:
    async def scenario(world: World) -> None:
        stream, rows_ND = world.stream(), draw(sum(counts))
        await stream.send(Request(request_id=7, layer=layer, expert_ids=ids, counts=counts), rows_ND)
        await stream.call.done_writing()
        header, out_ND = await stream.receive()
        assert header.request_id == 7
        assert header.batch_rows == sum(counts)
        assert header.compute_ns > 0
        assert out_ND is not None
        assert_near(out_ND, twin(world.directory, layer, ids, counts, rows_ND))
        assert await stream.call.read() is grpc.aio.EOF
        assert await stream.call.code() is grpc.StatusCode.OK
        await until(lambda: world.sample("requests_total", outcome="ok") == 1)

    play(scenario)


def test_a_request_and_its_answer_in_several_messages(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two large requests, their parts interleaved."""
    default = tensors.encode_rows.__defaults__
    monkeypatch.setattr(tensors.encode_rows, "__defaults__", (100 * TINY.hidden_size * 4,))
    assert default == (tensors.MAX_CHUNK_BYTES,)

    async def scenario(world: World) -> None:
        stream = world.stream()
        cases = {1: (0, [0, 1], [950, 1]), 2: (1, [3, 4], [200, 333])}
        messages = {}
        for key, (layer, ids, counts) in cases.items():
            header = Request(request_id=key, layer=layer, expert_ids=ids, counts=counts)
            messages[key] = list(tensors.encode_rows(header, draw(sum(counts), seed=key), "request_id"))
        assert len(messages[1]) == 10
        while any(messages.values()):
            for queue in messages.values():
                if queue:
                    await stream.call.write(queue.pop(0))
        for _ in cases:
            header, out_ND = await stream.receive()
            layer, ids, counts = cases[header.request_id]
            assert out_ND is not None
            assert_near(out_ND, twin(world.directory, layer, ids, counts, draw(sum(counts), seed=header.request_id)))

    play(scenario)


def test_requests_are_read_while_the_device_is_busy_and_joined(play: Any) -> None:
    """Three requests of two streams; those of one layer are one GEMM, and overtake the other layer's."""

    async def scenario(world: World) -> None:
        one, other = world.stream(), world.stream()
        release = threading.Event()
        world.device.post(release.wait)
        await one.send(Request(request_id=1, layer=0, expert_ids=[0], counts=[2]), draw(2, seed=1))
        await until(lambda: world.sample("queue") == 1)
        await one.send(Request(request_id=2, layer=1, expert_ids=[0], counts=[3]), draw(3, seed=2))
        await until(lambda: world.sample("queue") == 2)
        await one.send(Request(request_id=3, layer=0, expert_ids=[0, 4], counts=[1, 3]), draw(4, seed=3))
        await other.send(Request(request_id=1, layer=0, expert_ids=[4], counts=[5]), draw(5, seed=4))
        await until(lambda: world.sample("queue") == 4)
        release.set()
        answers = [await one.receive() for _ in range(3)]
        assert [header.request_id for header, _ in answers] == [1, 3, 2]
        assert [header.batch_rows for header, _ in answers] == [11, 11, 3]
        assert answers[0][0].queue_ns > 0
        assert_near(answers[1][1], twin(world.directory, 0, [0, 4], [1, 3], draw(4, seed=3)))
        header, out_ND = await other.receive()
        assert header.batch_rows == 11
        assert_near(out_ND, twin(world.directory, 0, [4], [5], draw(5, seed=4)))

    play(scenario)


GOOD = {"request_id": 5, "layer": 0, "expert_ids": [0, 4], "counts": [1, 2]}
ROWS = draw(3)


@pytest.mark.parametrize(
    ("field", "changes", "rows"),
    [
        ("layer", {"layer": 2}, ROWS),
        ("layer", {"layer": 2**32 - 1}, ROWS),
        ("expert_ids", {"expert_ids": [0, 8]}, ROWS),
        ("expert_ids", {"expert_ids": [4, 0]}, ROWS),
        ("expert_ids", {"expert_ids": [0, 0]}, ROWS),
        ("expert_ids", {"expert_ids": [0] * 100_000, "counts": [0] * 100_000}, ROWS),
        ("counts", {"counts": [1, 1]}, ROWS),
        ("counts", {"counts": [1, 2**32 - 1]}, ROWS),
        ("counts", {"counts": [3]}, ROWS),
        ("counts", {"counts": [1, 2, 0]}, ROWS),
        ("counts", {"expert_ids": [], "counts": []}, ROWS),
        ("payload", {}, None),
        ("payload.dtype", {}, ROWS.bfloat16()),
        ("payload.shape", {}, draw(3, TINY.hidden_size - 1)),
        ("payload.shape", {}, ROWS[None]),
        ("payload.shape", {}, torch.tensor(1.0)),
        ("payload.shape", {"counts": [MAX_ROWS, 1]}, draw(MAX_ROWS + 1)),
        ("remaining_rows", {"remaining_rows": MAX_ROWS}, ROWS),
        ("remaining_rows", {"remaining_rows": 2**32 - 1}, ROWS),
        ("payload.shape", {"remaining_rows": 3}, draw(1, 1000)),
    ],
    ids=str,
)
def test_a_bad_request_is_answered_and_the_stream_goes_on(
    play: Any, field: str, changes: dict[str, Any], rows: torch.Tensor | None
) -> None:
    async def scenario(world: World) -> None:
        stream = world.stream()
        await stream.call.write(tensors.encode(Request(**(GOOD | changes)), rows))
        header, out_ND = await stream.receive()
        assert header.request_id == 5
        assert header.failure.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert header.failure.field == field, header.failure
        assert header.failure.message.startswith(f"{field}: ")
        assert len(header.failure.message) < 300
        assert out_ND is None
        await world.assert_usable(stream)
        assert world.sample("requests_total", outcome="refused") == 1

    play(scenario)


@pytest.mark.parametrize(
    ("field", "tensor"),
    [
        ("payload.dtype", tensor_pb2.Tensor(shape=[3, 64], data=bytes(768))),
        ("payload.dtype", tensor_pb2.Tensor(dtype=77, shape=[3, 64], data=bytes(768))),  # type: ignore[arg-type]
        ("payload.data", tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[3, 64], data=bytes(767))),
        ("payload.data", tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[3, 2**32 - 1], data=bytes(768))),
        ("payload.shape", tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[0, 2**32 - 1])),
        ("payload", tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[0, *[2**32 - 1] * 3])),
    ],
    ids=str,
)
def test_a_bad_tensor_is_answered_and_the_stream_goes_on(play: Any, field: str, tensor: tensor_pb2.Tensor) -> None:
    async def scenario(world: World) -> None:
        stream = world.stream()
        await stream.call.write(Request(**GOOD, payload=tensor).SerializeToString())
        header, _ = await stream.receive()
        assert (header.request_id, header.failure.field) == (5, field)
        await world.assert_usable(stream)

    play(scenario)


def test_parts_of_a_refused_request_are_passed_over(play: Any) -> None:
    """One failure per request, not one per message; then the id is free again."""

    async def scenario(world: World) -> None:
        stream = world.stream()
        header = Request(request_id=5, layer=0, expert_ids=[0], counts=[MAX_ROWS + 100])
        await stream.send(header, draw(MAX_ROWS + 100), max_bytes=500 * TINY.hidden_size * 4)
        answer, _ = await stream.receive()
        assert answer.failure.field == "remaining_rows"
        await world.assert_usable(stream, request_id=5)

    play(scenario)


def test_parts_that_do_not_fit_together(play: Any) -> None:
    async def scenario(world: World) -> None:
        stream = world.stream()
        first = Request(request_id=5, layer=0, expert_ids=[0], counts=[6], remaining_rows=3)
        for second, rows in (
            (Request(request_id=5), draw(2)),
            (Request(request_id=5), draw(3).bfloat16()),
            (Request(request_id=5), draw(3, 63)),
            (Request(request_id=5), None),
        ):
            await stream.call.write(tensors.encode(first, draw(3)))
            await stream.call.write(tensors.encode(second, rows))
            answer, _ = await stream.receive()
            assert answer.failure.field in ("remaining_rows", "payload")
            await world.assert_usable(stream)

    play(scenario)


def test_halves_left_behind_do_not_use_up_the_stream(play: Any) -> None:
    async def scenario(world: World) -> None:
        stream = world.stream()
        for request_id in range(100, 100 + 2 * tensors.MAX_UNFINISHED):
            half = Request(request_id=request_id, layer=0, expert_ids=[0], counts=[6], remaining_rows=3)
            await stream.call.write(tensors.encode(half, draw(3)))
        await world.assert_usable(stream)
        await stream.call.write(tensors.encode(Request(request_id=request_id), draw(3)))
        answer, out_ND = await stream.receive()
        assert answer.request_id == request_id
        assert out_ND is not None

    play(scenario)


def test_an_id_in_flight_is_refused(play: Any) -> None:
    async def scenario(world: World) -> None:
        stream = world.stream()
        release = threading.Event()
        world.device.post(release.wait)
        for _ in range(2):
            await stream.send(Request(**GOOD), ROWS)
        answer, _ = await stream.receive()
        assert answer.failure.field == "request_id"
        release.set()
        answer, out_ND = await stream.receive()
        assert answer.request_id == 5
        assert out_ND is not None
        await world.assert_usable(stream, request_id=5)

    play(scenario)


def good_bytes() -> bytes:
    return tensors.encode(Request(**GOOD), ROWS)


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"hello", good_bytes()[:-1], good_bytes()[:7]], ids=len)
def test_bytes_that_are_no_request_end_the_stream(play: Any, data: bytes) -> None:
    async def scenario(world: World) -> None:
        stream = world.stream()
        await world.assert_usable(stream)
        await stream.call.write(data)
        error = await stream.error()
        assert isinstance(error, InvalidRequest), error
        assert "ForwardRequest" in error.message
        await world.assert_usable(world.stream())

    play(scenario)


def test_a_failed_computation_is_answered_and_the_stream_goes_on(
    play: Any, experts: ExpertSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(world: World) -> None:
        def explode(*_: object) -> torch.Tensor:
            raise RuntimeError("the device fell off the bus")

        stream = world.stream()
        with monkeypatch.context() as patch:
            patch.setattr(experts.layers[0], "forward", explode)
            await stream.send(Request(**GOOD), ROWS)
            answer, _ = await stream.receive()
        assert answer.failure.code == grpc.StatusCode.INTERNAL.value[0]
        assert "fell off the bus" in answer.failure.message
        await world.assert_usable(stream)
        assert world.sample("requests_total", outcome="failed") == 1

    play(scenario)


def test_a_stream_is_not_read_beyond_its_limit(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_stream, "MAX_IN_FLIGHT", 3)

    async def scenario(world: World) -> None:
        stream = world.stream()
        release = threading.Event()
        world.device.post(release.wait)
        for request_id in range(10):
            await stream.send(Request(**(GOOD | {"request_id": request_id})), ROWS)
        await until(lambda: world.sample("queue") == 3)
        await asyncio.sleep(0.05)
        assert world.sample("queue") == 3
        release.set()
        answered = [(await stream.receive())[0].request_id for _ in range(10)]
        assert sorted(answered) == list(range(10))

    play(scenario)


def test_work_of_a_caller_that_left_is_dropped(play: Any) -> None:
    async def scenario(world: World) -> None:
        stream = world.stream()
        release = threading.Event()
        world.device.post(release.wait)
        await stream.send(Request(**GOOD), ROWS)
        await until(lambda: world.sample("queue") == 1)
        stream.call.cancel()
        await until(lambda: not world.service._streams)
        release.set()
        await world.assert_usable(world.stream())
        assert world.sample("batch_rows_count") <= 1

    play(scenario)


def test_stopping_answers_what_was_read_and_ends_idle_streams(play: Any) -> None:
    async def scenario(world: World) -> None:
        busy, idle = world.stream(), world.stream()
        await world.assert_usable(idle)
        release = threading.Event()
        world.device.post(release.wait)
        await busy.send(Request(**GOOD), ROWS)
        await until(lambda: world.sample("queue") == 1)
        stopping = asyncio.create_task(world.server.stop(10.0))
        assert await idle.call.read() is grpc.aio.EOF
        release.set()
        answer, out_ND = await busy.receive()
        assert answer.request_id == 5
        assert out_ND is not None
        assert await busy.call.read() is grpc.aio.EOF
        async with asyncio.timeout(3):
            await stopping

    play(scenario)


def test_a_request_that_is_queued_for_too_long_is_never_computed(play: Any) -> None:
    async def scenario(world: World) -> None:
        stream = world.stream()
        release = threading.Event()
        world.device.post(release.wait)
        await stream.send(Request(**GOOD, timeout_ms=20), ROWS)
        await stream.send(Request(**(GOOD | {"request_id": 6}), timeout_ms=60_000), ROWS)
        await stream.send(Request(**(GOOD | {"request_id": 7})), ROWS)
        answer, out_ND = await stream.receive()
        assert answer.request_id == 5
        assert answer.failure.code == Code.DEADLINE_EXCEEDED
        assert out_ND is None
        release.set()
        assert sorted([(await stream.receive())[0].request_id for _ in range(2)]) == [6, 7]
        await until(lambda: world.sample("batch_rows_sum") > 0)
        assert world.sample("batch_rows_sum") == 2 * len(ROWS), "the first one's rows are not among them"
        assert world.sample("requests_total", outcome="expired") == 1
        await world.assert_usable(stream, request_id=5)

    play(scenario)


def test_a_request_answered_in_time_is_not_answered_again(play: Any) -> None:
    async def scenario(world: World) -> None:
        stream = world.stream()
        await stream.send(Request(**GOOD, timeout_ms=30), ROWS)
        answer, out_ND = await stream.receive()
        assert (answer.request_id, out_ND is not None) == (5, answer.failure.code != Code.DEADLINE_EXCEEDED)
        await asyncio.sleep(0.05)
        await world.assert_usable(stream)

    play(scenario)


def test_a_worker_that_drains_refuses_what_comes_and_answers_what_it_has(
    play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_stream, "DRAIN_LINGER", 0.5)

    async def scenario(world: World) -> None:
        describe = world.channel.unary_unary(
            f"/{NAME}/Describe",
            expert_pb2.ExpertDescribeRequest.SerializeToString,
            expert_pb2.ExpertDescribeResponse.FromString,
        )
        assert not (await describe(expert_pb2.ExpertDescribeRequest())).draining
        busy, late = world.stream(), world.stream()
        await world.assert_usable(late)
        release = threading.Event()
        world.device.post(release.wait)
        await busy.send(Request(**GOOD), ROWS)
        await until(lambda: world.sample("queue") == 1)
        world.service.drain()
        assert (await describe(expert_pb2.ExpertDescribeRequest())).draining
        for stream in (late, busy):
            await stream.send(Request(**(GOOD | {"request_id": 6})), ROWS)
            answer, _ = await stream.receive()
            assert answer.request_id == 6
            assert (answer.failure.code, answer.failure.reason) == (Code.UNAVAILABLE, Reason.SHUTTING_DOWN)
        error = await world.stream().error()
        assert (error.code, error.reason) == (Code.UNAVAILABLE, Reason.SHUTTING_DOWN)
        release.set()
        answer, out_ND = await busy.receive()
        assert answer.request_id == 5
        assert out_ND is not None
        assert await busy.call.read() is grpc.aio.EOF, "it ends by itself"

    play(scenario)
