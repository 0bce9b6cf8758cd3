"""A proxy that spoils answers: which ones, and what becomes of them."""

from __future__ import annotations

import asyncio
import tempfile

import grpc
import pytest
import torch

from benchmarks.chaos.proxy import Route
from benchmarks.chaos.spoil import Spoiling, spoilt
from grokmoe import tensors
from grokmoe.channel import open_channel
from grokmoe.errors import InvalidRequest
from grokmoe.server import RoleServer, Service, raw_stream
from grokmoe.v1 import expert_pb2

FORWARD = "/grokmoe.v1.Expert/Forward"
DESCRIBE = "/grokmoe.v1.Expert/Describe"


def answer(num_rows: int = 3) -> bytes:
    return tensors.encode(expert_pb2.ForwardResponse(request_id=7, compute_ns=5), torch.ones(num_rows, 4))


def test_duplicates_are_the_same_bytes() -> None:
    assert spoilt("duplicate", FORWARD, answer()) == [answer(), answer()]


def test_a_nan_is_in_one_row_and_the_header_stays() -> None:
    (data,) = spoilt("nan", FORWARD, answer())
    header, rows = tensors.decode(expert_pb2.ForwardResponse, data)
    assert (header.request_id, header.compute_ns) == (7, 5)
    assert rows is not None
    assert rows.isnan().any(1).tolist() == [False, False, True]


def test_a_wrong_shape_can_be_read() -> None:
    (data,) = spoilt("shape", FORWARD, answer())
    _, rows = tensors.decode(expert_pb2.ForwardResponse, data)
    assert rows is not None
    assert rows.shape == (3, 3)


def test_garbage_cannot() -> None:
    (data,) = spoilt("garbage", FORWARD, answer())
    with pytest.raises(InvalidRequest):
        tensors.decode(expert_pb2.ForwardResponse, data)


def test_only_data_is_spoilt_and_only_so_often() -> None:
    spoiling = Spoiling("nan", left=2)
    failure = expert_pb2.ForwardResponse(request_id=7).SerializeToString()
    taken = [spoiling.take(*each) for each in ((DESCRIBE, b""), (FORWARD, failure), *[(FORWARD, answer())] * 3)]
    assert taken == [False, False, True, True, False]
    assert spoiling.hits == 2


def test_nothing_is_spoilt_without_a_command() -> None:
    assert not Spoiling().take(FORWARD, answer())


async def upper(requests: object, context: grpc.aio.ServicerContext) -> None:
    async for data in requests:  # type: ignore[attr-defined]
        await context.write(data.upper())
    context.set_code(grpc.StatusCode.DATA_LOSS)
    context.set_details("that was all")


def test_a_route_passes_messages_and_the_status_on() -> None:
    async def scenario(folder: str) -> None:
        server = RoleServer([Service("test.Upper", {"Forward": raw_stream(upper)})])
        route = Route(f"unix:{folder}/near", await server.start(f"unix:{folder}/far"))
        await route.open()
        channel = open_channel(f"unix:{folder}/near")
        call = channel.stream_stream("/test.Upper/Forward")()
        for data in (b"one", b"two"):
            await call.write(data)
            assert await call.read() == data.upper()
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError, match="that was all") as ended:
            await call.read()
        assert ended.value.code() == grpc.StatusCode.DATA_LOSS
        await route.drop()
        again = channel.stream_stream("/test.Upper/Forward")()
        assert await again.code() == grpc.StatusCode.UNAVAILABLE
        await channel.close(None)
        await server.stop(None)
        await route.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(folder))


def test_a_late_answer_is_passed_by_others() -> None:
    async def scenario(folder: str) -> None:
        server = RoleServer([Service("grokmoe.v1.Expert", {"Forward": raw_stream(upper)})])
        route = Route(f"unix:{folder}/near", await server.start(f"unix:{folder}/far"))
        await route.open()
        route.spoiling = Spoiling("late", 0.2, 1)
        channel = open_channel(f"unix:{folder}/near")
        call = channel.stream_stream(FORWARD)()
        for data in (b"one", b"two"):
            await call.write(data)
        assert [await call.read(), await call.read()] == [b"TWO", b"ONE"]
        call.cancel()
        await channel.close(None)
        await server.stop(None)
        await route.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(folder))
