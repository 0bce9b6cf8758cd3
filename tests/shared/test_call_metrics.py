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
from grokmoe.server import RoleServer, Service, server_stream, unary, written_stream
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


SERVICE = Service(
    NAME,
    {
        "Good": unary(good, pb.AbortRequest, pb.AbortResponse),
        "Bad": unary(bad, pb.AbortRequest, pb.AbortResponse),
        "Stream": server_stream(stream, pb.AbortRequest, pb.AbortResponse),
        "Endless": server_stream(endless, pb.AbortRequest, pb.AbortResponse),
        "Written": written_stream(written, pb.AbortRequest),
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
    methods = {sample.labels["grpc_method"] for family in registry.collect() for sample in family.samples}
    assert methods == set(SERVICE.handlers), "a method that a caller made up"
