"""Calls as metrics: how they ended, by method, and nothing that a caller can make up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from grokmoe.call_metrics import CallMetrics
from grokmoe.channel import open_channel
from grokmoe.errors import InvalidRequest
from grokmoe.server import RoleServer, Service, raw_stream, server_stream, unary, written_stream
from grokmoe.v1 import control_pb2 as pb

NAME = "test.Service"


async def good(request: Any, context: Any) -> pb.AbortResponse:
    return pb.AbortResponse()


async def bad(request: Any, context: Any) -> pb.AbortResponse:
    raise InvalidRequest("field", "is bad")


async def stream(request: Any, context: Any) -> AsyncIterator[pb.AbortResponse]:
    yield pb.AbortResponse()
    raise InvalidRequest("field", "is bad")


async def endless(request: Any, context: Any) -> AsyncIterator[pb.AbortResponse]:
    while True:
        yield pb.AbortResponse()
        await asyncio.sleep(0.001)


async def written(request: Any, context: Any) -> None:
    await context.write(pb.AbortResponse().SerializeToString())


async def echo(_: Any, context: Any) -> None:
    while (message := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
        await context.write(message)


SERVICE = Service(
    NAME,
    {
        "Good": unary(good, pb.AbortRequest, pb.AbortResponse),
        "Bad": unary(bad, pb.AbortRequest, pb.AbortResponse),
        "Stream": server_stream(stream, pb.AbortRequest, pb.AbortResponse),
        "Endless": server_stream(endless, pb.AbortRequest, pb.AbortResponse),
        "Written": written_stream(written, pb.AbortRequest),
        "Echo": raw_stream(echo),
    },
)


async def calls(registry: CollectorRegistry) -> None:
    metrics = CallMetrics(registry, {NAME: SERVICE.handlers})
    server = RoleServer([SERVICE], None, [metrics])
    channel = open_channel(await server.start("127.0.0.1:0"))
    try:
        request = pb.AbortRequest().SerializeToString()
        assert await channel.unary_unary(f"/{NAME}/Good")(request) == b""
        for method in ("Bad", "MadeUp"):
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary(f"/{NAME}/{method}")(request)
        with pytest.raises(grpc.aio.AioRpcError):
            [answer async for answer in channel.unary_stream(f"/{NAME}/Stream")(request)]
        assert [answer async for answer in channel.unary_stream(f"/{NAME}/Written")(request)] == [b""]
        both = channel.stream_stream(f"/{NAME}/Echo")()
        for message in (b"a", b"b", b"c"):
            await both.write(message)
            assert await both.read() == message
        await both.done_writing()
        assert await both.read() is grpc.aio.EOF  # type: ignore[attr-defined]
        left = channel.unary_stream(f"/{NAME}/Endless")(request)
        await left.read()
        left.cancel()
        async with asyncio.timeout(30):
            while count(registry, "Endless", "server_stream", "CANCELLED") is None:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    finally:
        await channel.close(None)
        await server.stop(0)


def count(registry: CollectorRegistry, method: str, kind: str, code: str) -> float | None:
    labels = {"grpc_type": kind, "grpc_service": NAME, "grpc_method": method, "grpc_code": code}
    return registry.get_sample_value("grpc_server_handled_total", labels)


def test_every_call_is_counted_by_how_it_ended() -> None:
    registry = CollectorRegistry()
    asyncio.run(calls(registry))
    for method, kind, code in (
        ("Good", "unary", "OK"),
        ("Bad", "unary", "INVALID_ARGUMENT"),
        ("Stream", "server_stream", "INVALID_ARGUMENT"),
        ("Written", "server_stream", "OK"),
        ("Endless", "server_stream", "CANCELLED"),
    ):
        assert count(registry, method, kind, code) == 1, method
        labels = {"grpc_type": kind, "grpc_service": NAME, "grpc_method": method}
        assert registry.get_sample_value("grpc_server_started_total", labels) == 1
        assert registry.get_sample_value("grpc_server_handling_seconds_count", labels) == 1
        assert registry.get_sample_value("grpc_server_msg_received_total", labels) == 1
    sent = {"Good": 1, "Bad": 0, "Stream": 1, "Written": 1, "Echo": 3}
    for method, number in sent.items():
        labels = {"grpc_service": NAME, "grpc_method": method}
        found = [
            registry.get_sample_value("grpc_server_msg_sent_total", {"grpc_type": kind, **labels}) or 0
            for kind in ("unary", "server_stream", "bidi_stream")
        ]
        assert sum(found) == number, method
    labels = {"grpc_type": "bidi_stream", "grpc_service": NAME, "grpc_method": "Echo"}
    assert registry.get_sample_value("grpc_server_msg_received_total", labels) == 3
    methods = {sample.labels["grpc_method"] for family in registry.collect() for sample in family.samples}
    assert methods == set(SERVICE.handlers), "a method that a caller made up"
