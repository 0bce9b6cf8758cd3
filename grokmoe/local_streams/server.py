"""The worker's end: the same handlers as gRPC's, with a context that has what they use of gRPC's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.rpc import status_pb2

from grokmoe.errors import GrokmoeError, InvalidRequest, NotFound, Reason
from grokmoe.local_streams.frames import DETAILS_KEY, Frames, Kind
from grokmoe.status import to_status

logger = logging.getLogger(__name__)

Handler = Callable[[Any, Any], Awaitable[None]]
Prove = Callable[[str, tuple[tuple[str, str], ...]], object]
"""(method, metadata): raises the GrokmoeError that a caller who may not call it is refused with."""

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class _Ended(Exception):
    """The handler has ended the stream itself."""


class _Context:
    """What a handler of a raw stream uses of grpc.aio.ServicerContext."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames

    async def read(self) -> Any:
        """The next message, or EOF."""
        frame = await self._frames.read()
        if frame is None or frame[0] is not Kind.MESSAGE:
            return _EOF
        return frame[1]

    async def write(self, message: bytes) -> None:
        """Sends one message. Raises grpc.aio.BaseError when the caller is gone."""
        if self._frames.write_now(Kind.MESSAGE, message):
            return
        try:
            await self._frames.write(Kind.MESSAGE, message)
        except ConnectionError as error:
            raise grpc.aio.InternalError(str(error)) from error

    async def abort_with_status(self, status: Any) -> None:
        """Ends the stream. Never returns."""
        content = dict(status.trailing_metadata or ()).get(DETAILS_KEY)
        if content is None:
            content = status_pb2.Status(code=status.code.value[0], message=status.details).SerializeToString()
        with contextlib.suppress(ConnectionError):
            await self._frames.write(Kind.END, content)
        raise _Ended


class LocalServer:
    """Serves streams on a Unix socket that only processes of the same user can use."""

    def __init__(self, methods: Mapping[str, Handler], prove: Prove = lambda method, metadata: None) -> None:
        """methods: `/service/method` -> handler of a raw stream."""
        self._methods, self._prove = dict(methods), prove
        self._server: Any = None
        self._path = ""
        self._streams: set[asyncio.Task[None]] = set()

    @property
    def has_streams(self) -> bool:
        """Whether there is anything to serve."""
        return bool(self._methods)

    async def start(self, path: str) -> None:
        """Binds and serves. Raises OSError when it cannot."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of a worker that did not end well
        mask = os.umask(0o177)
        try:
            self._server = await asyncio.get_running_loop().create_unix_server(self._accept, path)
        finally:
            os.umask(mask)
        self._path = path

    def _accept(self) -> Frames:
        frames = Frames()
        task = asyncio.ensure_future(self._serve(frames))
        self._streams.add(task)
        task.add_done_callback(self._streams.discard)
        frames.on_end = task.cancel  # as gRPC does with the handler of a caller that is gone
        return frames

    async def _serve(self, frames: Frames) -> None:
        context = _Context(frames)
        try:
            opening = await frames.read()
            if opening is None:
                return
            handler = await self._admit(context, *opening)
            await handler(None, context)
            await frames.write(Kind.END, status_pb2.Status().SerializeToString())
        except (_Ended, ConnectionError):
            pass
        except Exception as error:
            logger.exception("a stream has failed", exc_info=error)
            code = grpc.StatusCode.UNKNOWN.value[0]  # as gRPC does
            status = status_pb2.Status(code=code, message=f"unexpected {type(error).__name__}")
            with contextlib.suppress(ConnectionError):
                await frames.write(Kind.END, status.SerializeToString())
        finally:
            frames.on_end = lambda: None
            frames.close()

    async def _admit(self, context: _Context, kind: Kind, content: bytearray) -> Handler:
        method, _, authorization = content.decode(errors="replace").partition("\n")
        try:
            if kind is not Kind.OPEN:
                raise InvalidRequest("", "the first frame opens no stream", reason=Reason.MALFORMED_MESSAGE)
            self._prove(method, (("authorization", authorization),) if authorization else ())
            if method not in self._methods:
                raise NotFound(f"there is no stream {method[:128]!r} here")
        except GrokmoeError as error:
            await context.abort_with_status(to_status(error))
        return self._methods[method]

    async def stop(self, grace: float) -> None:
        """Takes no more connections; streams get `grace` seconds to end by themselves."""
        if self._server is None:
            return
        self._server.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        if self._streams:
            _, running = await asyncio.wait(self._streams, timeout=grace)
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)
