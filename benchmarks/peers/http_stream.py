"""As much of HTTP as a load of streaming clients needs: server-sent events from a POST, at little cost per event."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from benchmarks.peers.child import PeerFailed

MAX_LINE = 1 << 20
"""Bytes of an event at most."""


async def get_status(host: str, port: int, path: str) -> int | None:
    """The status of a GET; None if nobody listens."""
    try:
        async with _request(host, port, f"GET {path} HTTP/1.1", b"") as reader:
            return await _status(reader)
    except (OSError, asyncio.IncompleteReadError):
        return None


async def post_events(host: str, port: int, path: str, request: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each event of the answer, as they come. Raises PeerFailed for another status than 200."""
    async with _request(host, port, f"POST {path} HTTP/1.1", json.dumps(request).encode()) as reader:
        status = await _status(reader)
        is_chunked = False
        while line := (await reader.readline()).strip():
            is_chunked |= line.lower().replace(b" ", b"") == b"transfer-encoding:chunked"
        if status != 200:
            raise PeerFailed(f"{path} answered with {status}: {(await reader.read(500)).decode(errors='replace')}")
        rest = b""
        async for data in _chunks(reader) if is_chunked else _blocks(reader):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    yield json.loads(line.removeprefix(b"data: "))


@contextlib.asynccontextmanager
async def _request(host: str, port: int, line: str, body: bytes) -> AsyncIterator[asyncio.StreamReader]:
    reader, writer = await asyncio.open_connection(host, port, limit=MAX_LINE)
    try:
        head = (line, f"Host: {host}", "Content-Type: application/json", f"Content-Length: {len(body)}")
        writer.write("\r\n".join((*head, "Connection: close", "", "")).encode() + body)
        await writer.drain()
        yield reader
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _status(reader: asyncio.StreamReader) -> int | None:
    words = (await reader.readline()).split()
    return int(words[1]) if len(words) > 1 else None


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of a chunked body."""
    while size := int(await reader.readline() or b"0", 16):
        data = await reader.readexactly(size + 2)
        yield data[:-2]


async def _blocks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of a body that ends with the connection."""
    while data := await reader.read(1 << 16):
        yield data
