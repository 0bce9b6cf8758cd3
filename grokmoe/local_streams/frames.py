"""Frames on a connection: cut from its bytes, joined to them, with as much room on either side as is good."""

from __future__ import annotations

import asyncio
import enum
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

SUFFIX = ".rows"
"""What the path of the socket for streams has after that of the worker's gRPC socket."""

DETAILS_KEY = "grpc-status-details-bin"
"""Of trailing metadata: where gRPC has the google.rpc.Status that END carries here."""

HEADER = struct.Struct("<IB")
MAX_FRAME_BYTES = 64 * 1024 * 1024
"""Longer frames are refused before anything is kept of them. Senders cut rows at 2 MiB (grokmoe.tensors)."""

STAGING_BYTES = 64 * 1024
"""Short frames are read several at a time; the rest of a longer one goes straight to where it will stay."""

MAX_UNREAD_BYTES = 8 * 1024 * 1024
"""Beyond it nothing is taken from the socket, until some of it has been read: the sender's writes wait."""

MAX_UNSENT_BYTES = 1024 * 1024


class Kind(enum.IntEnum):
    """What a frame is."""

    OPEN = 1
    MESSAGE = 2
    END = 3


Frame = tuple[Kind, bytearray]


class Broken(Exception):
    """Bytes that are no frame."""


class Frames(asyncio.BufferedProtocol):
    """One end of a connection. Belongs to one event loop; one reader at a time."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._staging = bytearray(STAGING_BYTES)
        self._staged = 0
        self._body: bytearray | None = None
        self._body_kind, self._filled = Kind.MESSAGE, 0
        self._frames: deque[Frame] = deque()
        self._unread = 0
        self._is_paused = False
        self._reader: asyncio.Future[None] | None = None
        self._writers: deque[asyncio.Future[None]] = deque()
        self._may_write = True
        self._is_over = False
        self.over = asyncio.Event()
        self.error: Exception | None = None
        self.on_end: Callable[[], object] = lambda: None

    def connection_made(self, transport: Any) -> None:
        """See asyncio.Protocol."""
        self._transport = transport
        transport.set_write_buffer_limits(high=MAX_UNSENT_BYTES)

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio.BufferedProtocol."""
        if self._body is not None:
            return memoryview(self._body)[self._filled :]
        return memoryview(self._staging)[self._staged :]

    def buffer_updated(self, num_bytes: int) -> None:
        """See asyncio.BufferedProtocol."""
        if self._body is not None:
            self._filled += num_bytes
            if self._filled == len(self._body):
                self._add(self._body_kind, self._body)
                self._body = None
        else:
            self._staged += num_bytes
            try:
                self._cut()
            except Broken as error:
                self.error = error
                self.close()

    def _cut(self) -> None:
        """Takes what is staged: whole frames, and the beginning of one."""
        at, staged = 0, memoryview(self._staging)[: self._staged]
        while self._staged - at >= HEADER.size:
            length, kind = HEADER.unpack_from(staged, at)
            if length > MAX_FRAME_BYTES or kind not in Kind._value2member_map_:
                raise Broken(f"a frame of kind {kind} and {length} bytes")
            begin, end = at + HEADER.size, at + HEADER.size + length
            if end <= self._staged:
                self._add(Kind(kind), bytearray(staged[begin:end]))
                at = end
                continue
            if length > STAGING_BYTES // 2:
                self._body, self._body_kind, self._filled = bytearray(length), Kind(kind), self._staged - begin
                self._body[: self._filled] = staged[begin:]
                at = self._staged
            break
        left = self._staged - at
        if at and left:
            self._staging[:left] = bytes(staged[at:])
        self._staged = left

    def _add(self, kind: Kind, content: bytearray) -> None:
        self._frames.append((kind, content))
        self._unread += len(content)
        if self._unread > MAX_UNREAD_BYTES and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._may_write = False

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._may_write = True
        while self._writers:
            writer = self._writers.popleft()
            if not writer.done():
                writer.set_result(None)

    def eof_received(self) -> bool:
        """See asyncio.Protocol. The connection is closed: neither side goes on alone."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._is_over = True
        self.over.set()
        self.error = self.error or error
        self.resume_writing()
        self._wake()
        self.on_end()

    async def read(self) -> Frame | None:
        """The next frame; None when the connection is over and all has been read."""
        while not self._frames:
            if self._is_over:
                return None
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        frame = self._frames.popleft()
        self._unread -= len(frame[1])
        if self._is_paused and self._unread <= MAX_UNREAD_BYTES // 2:
            self._is_paused = False
            if not self._is_over:
                self._transport.resume_reading()
        return frame

    def write_now(self, kind: Kind, content: bytes) -> bool:
        """Sends a frame if that needs no waiting; False: it was not sent."""
        if self._is_over or not self._may_write or self._transport.is_closing():
            return False
        self._transport.writelines((HEADER.pack(len(content), kind), content))
        return True

    def last(self) -> Frame | None:
        """The last frame that has come, if nobody has read it."""
        return self._frames[-1] if self._frames else None

    async def write(self, kind: Kind, content: bytes) -> None:
        """Sends a frame; waits while the other side takes none. Raises ConnectionError when the connection is over."""
        if self._is_over or self._transport.is_closing():
            raise ConnectionError("the connection is over")
        self._transport.writelines((HEADER.pack(len(content), kind), content))
        while not self._may_write and not self._is_over:
            writer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._writers.append(writer)
            await writer

    def close(self) -> None:
        """Ends the connection once what was written is sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Ends the connection now."""
        if self._transport is not None:
            self._transport.abort()
