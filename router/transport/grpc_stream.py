"""What links over gRPC share: long-lived bidirectional streams, undecoded bytes both ways, one per worker and lane.

A stream that fails is thrown away and opened anew by the next call on its lane.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc

from grokmoe.channel import TIMEOUTS
from grokmoe.errors import FailedPrecondition, GrokmoeError, InvalidRequest, Unavailable
from grokmoe.status import from_rpc_error

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]

ANY_ROWS = 1 << 31
"""Workers are trusted with the size of their answers: it follows from what they were asked."""


class Stream:
    """One open stream: whole messages in, whole messages out, errors as errors of our tree."""

    def __init__(self, channel: grpc.aio.Channel, method: str) -> None:
        untyped: Any = channel  # grpc-stubs knows neither raw bytes nor the read/write style
        self._call: Any = untyped.stream_stream(method)()

    async def write(self, messages: Iterable[bytes]) -> None:
        try:
            for message in messages:
                await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise await self._why(error) from error

    async def read(self) -> bytes:
        try:
            data = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise await self._why(error) from error
        if data is _EOF:
            raise await self._why(None)
        return bytes(data)

    async def _why(self, error: Exception | None) -> GrokmoeError:
        """The stream has ended. That is a lost worker, whatever the status, unless it says that we are at fault."""
        if isinstance(error, grpc.aio.AioRpcError):
            why = from_rpc_error(error)
            is_ours = isinstance(why, InvalidRequest | FailedPrecondition | Unavailable)
            return why if is_ours else Unavailable(f"the worker ended the stream: {why.message}")
        code, details = await self._call.code(), await self._call.details()
        if code in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
            return Unavailable("the worker ended the stream")
        return Unavailable(f"the worker ended the stream: {code.name}: {details}")

    def cancel(self) -> None:
        self._call.cancel()


async def describe(channel: grpc.aio.Channel, service: str, request: Any, response: Any) -> Any:
    call = channel.unary_unary(f"/{service}/Describe", request.SerializeToString, response.FromString)
    try:
        return await call(request, timeout=TIMEOUTS.describe)
    except grpc.aio.AioRpcError as error:
        raise Unavailable(f"{error.code().name}: {error.details()}") from error
