"""Events of an HTTP answer, whole, in order, however they are cut on the way."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence

import pytest

from benchmarks.peers.child import PeerFailed
from benchmarks.peers.http_stream import get_status, post_events

EVENTS = [{"tokens": [number], "text": "ü\n" * number} for number in range(5)]
BODY = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in EVENTS) + b"data: [DONE]\n\n"


@contextlib.asynccontextmanager
async def server(head: bytes, pieces: Sequence[bytes], seen: list[bytes]) -> AsyncIterator[int]:
    """Sends this to whoever asks. Yields the port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        length = int(request.lower().partition(b"content-length: ")[2].split()[0])
        seen.append(request + await reader.readexactly(length))
        for piece in (head, *pieces):
            writer.write(piece)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


def chunked(step: int) -> list[bytes]:
    parts = [BODY[at : at + step] for at in range(0, len(BODY), step)]
    return [b"%x\r\n%s\r\n" % (len(part), part) for part in parts] + [b"0\r\n\r\n"]


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "pieces"),
    [
        (CHUNKED, chunked(len(BODY))),
        (CHUNKED, chunked(7)),
        (CHUNKED, chunked(1)),
        (PLAIN, [BODY]),
        (PLAIN, [BODY[:9], BODY[9:]]),
    ],
    ids=["one chunk", "small chunks", "bytes", "no chunks", "no chunks, two writes"],
)
def test_events_arrive_whole(head: bytes, pieces: Sequence[bytes]) -> None:
    async def main() -> None:
        seen: list[bytes] = []
        async with server(head, pieces, seen) as port:
            found = [event async for event in post_events("127.0.0.1", port, "/completion", {"n": 3})]
        assert found == EVENTS
        assert seen[0].startswith(b"POST /completion HTTP/1.1\r\n")
        assert seen[0].endswith(b'\r\n\r\n{"n": 3}')

    asyncio.run(main())


def test_an_error_is_told_with_its_words() -> None:
    async def main() -> None:
        async with server(b"HTTP/1.1 503 Busy\r\n\r\n", [b"no slot"], []) as port:
            with pytest.raises(PeerFailed, match="503: no slot"):
                _ = [event async for event in post_events("127.0.0.1", port, "/completion", {})]
            assert await get_status("127.0.0.1", port, "/health") == 503

    asyncio.run(main())


def test_nobody_there_has_no_status() -> None:
    async def main() -> None:
        async with server(PLAIN, [], []) as port:
            assert await get_status("127.0.0.1", port, "/health") == 200
        assert await get_status("127.0.0.1", port, "/health") is None

    asyncio.run(main())
