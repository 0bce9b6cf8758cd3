"""What links over gRPC share: long-lived bidirectional streams, undecoded bytes both ways, one per worker and lane.

A stream that fails is thrown away and opened anew by the next call on its lane.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc

from grokmoe.channel import TIMEOUTS
from grokmoe.errors import ConfigError, FailedPrecondition, GrokmoeError, InvalidRequest, Unavailable
from grokmoe.local_streams import LocalCall
from grokmoe.status import from_rpc_error
from router.transport.worker_access import WorkerChannel

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]

ANY_ROWS = 1 << 31
"""Workers are trusted with the size of their answers: it follows from what they were asked."""

_REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


class Stream:
    """One open stream: whole messages in, whole messages out, errors as errors of our tree."""

    def __init__(self, channel: WorkerChannel, method: str) -> None:
        self._call: Any = channel.stream(method)

    @property
    def is_direct(self) -> bool:
        """Whether messages may be sent without waiting, which gRPC cannot promise."""
        return isinstance(self._call, LocalCall)

    def write_now(self, message: bytes) -> bool:
        """Sends one message on a direct stream if it takes it at once; False: it was not sent."""
        return self.is_direct and bool(self._call.write_now(message))

    async def write(self, messages: Iterable[bytes]) -> None:
        try:
            for message in messages:
                if not self.write_now(message):
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
        return data  # type: ignore[no-any-return]

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


async def describe(channel: WorkerChannel, service: str, request: Any, response: Any) -> Any:
    try:
        return await channel.unary(f"/{service}/Describe", request, response, TIMEOUTS.describe)
    except grpc.aio.AioRpcError as error:
        if error.code() in _REFUSALS:  # does not pass by itself: somebody has to look at the tokens
            raise ConfigError(f"the worker refuses this router: {error.details()}") from error
        raise Unavailable(f"{error.code().name}: {error.details()}") from error
