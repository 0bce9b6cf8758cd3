"""The caller's end: what `grpc.aio`'s call of a bidirectional stream is, as far as the router uses it."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from grokmoe.local_streams.frames import DETAILS_KEY, SUFFIX, Frames, Kind
from grokmoe.target import parse_target

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def find_socket(address: str) -> str | None:
    """The path of the socket for streams beside a worker's address, if there is one that we may use."""
    path = address.removeprefix("unix:")
    if path == address or not parse_target(address).is_local:
        return None
    path += SUFFIX
    return path if os.access(path, os.R_OK | os.W_OK) else None


class LocalCall:
    """One stream. Connects with its first message or read; errors are gRPC's."""

    def __init__(self, path: str, method: str, authorization: str = "") -> None:
        """authorization: as the header of that name has it."""
        self._path, self._opening = path, f"{method}\n{authorization}".encode()
        self._frames: Frames | None = None
        self._connecting = asyncio.Lock()
        self._error: grpc.aio.AioRpcError | None = None
        self._is_cancelled = False

    async def _connected(self) -> Frames:
        if self._error is not None:
            raise self._error
        if self._frames is None:
            async with self._connecting:
                if self._frames is None:
                    self._frames = await self._connect()
        return self._frames

    async def _connect(self) -> Frames:
        try:
            _, frames = await asyncio.get_running_loop().create_unix_connection(Frames, self._path)
            if self._is_cancelled:
                frames.abort()
            await frames.write(Kind.OPEN, self._opening)
        except OSError as error:
            self._error = _rpc_error(grpc.StatusCode.UNAVAILABLE, f"{type(error).__name__}: {error}")
            raise self._error from error
        return frames

    def write_now(self, message: bytes) -> bool:
        """Sends one message if that needs no waiting; False: it was not sent, and `write` will say why."""
        return self._frames is not None and self._error is None and self._frames.write_now(Kind.MESSAGE, message)

    async def write(self, message: bytes) -> None:
        """Sends one message. Raises AioRpcError when the stream is over."""
        frames = await self._connected()
        try:
            await frames.write(Kind.MESSAGE, message)
        except ConnectionError:
            raise self._over(frames) from None

    def _over(self, frames: Frames) -> grpc.aio.AioRpcError:
        """Why it is over; that may stand behind messages that nobody has read."""
        if self._error is None:
            last = frames.last()
            if last is not None and last[0] is Kind.END:
                self._error = _end(last[1])
            else:
                why = f"the connection is lost: {frames.error}" if frames.error else "the worker closed the connection"
                self._error = _rpc_error(grpc.StatusCode.UNAVAILABLE, why)
        return self._error

    async def read(self) -> Any:
        """The next message, or EOF at a good end. Raises AioRpcError at another."""
        frames = await self._connected()
        frame = await frames.read()
        if frame is not None:
            kind, content = frame
            if kind is Kind.MESSAGE:
                return content
            self._error = self._error or _end(content)
            frames.close()
        error = self._over(frames)
        if error.code() is grpc.StatusCode.OK:
            return _EOF
        raise error

    async def code(self) -> grpc.StatusCode:
        """How it ended; waits for that."""
        return (await self._ended()).code()

    async def details(self) -> str:
        """The words of that."""
        return (await self._ended()).details() or ""

    async def _ended(self) -> grpc.aio.AioRpcError:
        if self._error is not None:
            return self._error
        try:
            frames = await self._connected()
        except grpc.aio.AioRpcError as error:
            return error
        await frames.over.wait()
        return self._over(frames)

    def done(self) -> bool:
        """Whether it is over."""
        return self._error is not None

    def cancel(self) -> None:
        """Ends it; the worker forgets what it has not answered."""
        self._is_cancelled = True
        self._error = self._error or _rpc_error(grpc.StatusCode.CANCELLED, "cancelled here")
        if self._frames is not None:
            self._frames.abort()


def _rpc_error(code: grpc.StatusCode, details: str, status: bytes = b"") -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata(*(((DETAILS_KEY, status),) if status else ()))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details, None)


def _end(content: bytearray) -> grpc.aio.AioRpcError:
    try:
        status = status_pb2.Status.FromString(bytes(content))
    except DecodeError:
        return _rpc_error(grpc.StatusCode.INTERNAL, "the stream's end cannot be read")
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return _rpc_error(code, status.message, bytes(content) if status.details else b"")
