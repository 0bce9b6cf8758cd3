"""Limits of the transport: what is too large or too much is refused with the right code, and harms nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc
import pytest

from grokmoe.access import Scope
from grokmoe.channel import MAX_METADATA_BYTES, MAX_REQUEST_BYTES, open_channel
from grokmoe.security import SecuritySettings
from grokmoe.server import RoleServer, Service, raw_stream
from tests.security.test_tokens import UNARY, names


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


@pytest.mark.parametrize(
    ("scope", "size", "code"),
    [
        # A field that Empty does not know: a valid message of any size.
        (Scope.INFERENCE, MAX_REQUEST_BYTES - 100, "OK"),
        (Scope.INFERENCE, MAX_REQUEST_BYTES + 100, "RESOURCE_EXHAUSTED"),
        (Scope.CONTROL, MAX_REQUEST_BYTES + 100, "RESOURCE_EXHAUSTED"),
        (Scope.CLUSTER, MAX_REQUEST_BYTES + 100, "OK"),
    ],
)
def test_a_message_has_a_size(scope: Scope, size: int, code: str) -> None:
    async def main() -> None:
        async with names(SecuritySettings(), scope) as (_, channel, _server):
            length = size - 8
            varint = bytes((length >> shift & 0x7F) | (0x80 if shift < 21 else 0) for shift in (0, 7, 14, 21))
            assert (await channel.unary_unary(UNARY)(b"\x7a" + varint + bytes(length)).code()).name == code
            assert await channel.unary_unary(UNARY)(b"").code() is grpc.StatusCode.OK

    run(main())


def test_metadata_has_a_size() -> None:
    async def main() -> None:
        async with names(SecuritySettings()) as (_, channel, _server):
            much = (("x-much", "x" * (3 * MAX_METADATA_BYTES)),)
            assert await channel.unary_unary(UNARY)(b"", metadata=much).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            some = (("x-some", "x" * (MAX_METADATA_BYTES // 2)),)
            assert await channel.unary_unary(UNARY)(b"", metadata=some).code() is grpc.StatusCode.OK

    run(main())


def test_a_connection_has_so_many_calls_at_a_time() -> None:
    async def main() -> None:
        running, most, release = 0, 0, asyncio.Event()

        async def hold(requests: Any, context: Any) -> None:
            nonlocal running, most
            running, most = running + 1, max(most, running + 1)
            if running == 3:
                release.set()
            await release.wait()
            running -= 1

        service = Service("test.Hold", {"Hold": raw_stream(hold)})
        server = RoleServer([service], SecuritySettings(max_calls=3))
        async with open_channel(await server.start("127.0.0.1:0")) as channel:
            untyped: Any = channel
            calls = [untyped.stream_stream("/test.Hold/Hold")() for _ in range(20)]
            codes = [await call.code() for call in calls]
        await server.stop(0)
        # Those beyond the limit wait in the client, or are sent before it knows the limit and never begin.
        assert codes.count(grpc.StatusCode.OK) >= 3
        assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        assert most == 3

    run(main())
