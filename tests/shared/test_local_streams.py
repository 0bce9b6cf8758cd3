"""Streams past gRPC: frames, both ends, and every way a stream can end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokmoe.errors import Reason, Unauthenticated, Unavailable
from grokmoe.local_streams import SUFFIX, LocalCall, LocalServer, find_socket, frames
from grokmoe.local_streams.frames import HEADER, Frames, Kind
from grokmoe.status import from_rpc_error, to_status
from tests.router.tiny import TIMEOUT, until

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
METHOD = "/s/M"


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.is_paused, self.is_closed = False, False

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def close(self) -> None:
        self.is_closed = True


def feed(end: Frames, data: bytes, sizes: list[int]) -> None:
    """Hands bytes over in pieces, as an event loop does."""
    at = turn = 0
    while at < len(data):
        room = end.get_buffer(-1)
        size = min(len(room), sizes[turn % len(sizes)], len(data) - at)
        room[:size] = data[at : at + size]
        end.buffer_updated(size)
        at, turn = at + size, turn + 1


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 4, 5, 100, 32768, 32769, 65531, 65536, 200_000]), max_size=8),
    sizes=st.lists(st.sampled_from([1, 3, 5, 100, 5000, 65536, 1 << 20]), min_size=1, max_size=4),
)
def test_frames_come_out_however_their_bytes_are_cut(lengths: list[int], sizes: list[int]) -> None:
    if min(sizes) == 1 and sum(lengths) > 100_000:
        sizes = [size + 999 for size in sizes]
    contents = [bytes([index + 1]) * length for index, length in enumerate(lengths)]
    data = b"".join(HEADER.pack(len(content), Kind.MESSAGE) + content for content in contents)

    async def main() -> None:
        end = Frames()
        end.connection_made(Wire())
        feed(end, data, sizes)
        assert [await end.read() for _ in contents] == [(Kind.MESSAGE, bytearray(content)) for content in contents]

    asyncio.run(main())


@pytest.mark.parametrize("head", [HEADER.pack(frames.MAX_FRAME_BYTES + 1, 2), HEADER.pack(1, 9), HEADER.pack(0, 0)])
def test_what_is_no_frame_ends_the_connection(head: bytes) -> None:
    async def main() -> None:
        end, wire = Frames(), Wire()
        end.connection_made(wire)
        feed(end, head, [5])
        assert wire.is_closed
        assert isinstance(end.error, frames.Broken)

    asyncio.run(main())


def test_a_reader_that_rests_stops_the_sender() -> None:
    async def main() -> None:
        end, wire = Frames(), Wire()
        end.connection_made(wire)
        content = bytes(1 << 20)
        frame = HEADER.pack(len(content), Kind.MESSAGE) + content
        count = 0
        while not wire.is_paused:
            feed(end, frame, [1 << 20])
            count += 1
        assert count == frames.MAX_UNREAD_BYTES // len(content) + 1
        while wire.is_paused:
            await end.read()
            count -= 1
        assert count == frames.MAX_UNREAD_BYTES // len(content) // 2

    asyncio.run(main())


async def echo(requests: Any, context: Any) -> None:
    while (message := await context.read()) is not EOF:
        await context.write(bytes(message) + b"!")


@contextlib.asynccontextmanager
async def served(
    folder: Path, handler: Callable[[Any, Any], Awaitable[None]] = echo, **options: Any
) -> AsyncIterator[tuple[LocalServer, str]]:
    """A server, and the address that finds it."""
    server = LocalServer({METHOD: handler}, **options)
    await server.start(f"{folder}/w{SUFFIX}")
    try:
        async with asyncio.timeout(TIMEOUT):
            yield server, f"unix:{folder}/w"
    finally:
        await server.stop(0)


def call(address: str, method: str = METHOD, authorization: str = "") -> LocalCall:
    path = find_socket(address)
    assert path is not None
    return LocalCall(path, method, authorization)


def test_messages_go_both_ways(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path) as (_, address):
            one, other = call(address), call(address)
            for message in (b"a", b"", b"x" * 3_000_000):
                await one.write(message)
                await other.write(message + b"?")
                assert await one.read() == message + b"!"
                assert await other.read() == message + b"?!"
            one.cancel()
            other.cancel()
            assert one.done()

    asyncio.run(main())


def test_only_the_same_user_may_connect(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path) as (_, address):
            path = find_socket(address)
            assert path is not None
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600

    asyncio.run(main())


def test_where_there_is_no_socket_there_is_no_stream(tmp_path: Path) -> None:
    assert find_socket(f"unix:{tmp_path}/w") is None
    assert find_socket("127.0.0.1:1") is None
    assert find_socket("dns:///somewhere:1") is None


def test_a_socket_that_nobody_serves_is_an_unavailable_worker(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path):
            os.link(f"{tmp_path}/w{SUFFIX}", f"{tmp_path}/old{SUFFIX}")
        stream = call(f"unix:{tmp_path}/old")
        for use in (stream.write(b"a"), stream.read()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await use
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(main())


def test_another_server_takes_the_place_of_one_that_died(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path):
            os.link(f"{tmp_path}/w{SUFFIX}", f"{tmp_path}/kept")
        os.rename(f"{tmp_path}/kept", f"{tmp_path}/w{SUFFIX}")
        async with served(tmp_path) as (_, address):
            stream = call(address)
            await stream.write(b"a")
            assert await stream.read() == b"a!"
            stream.cancel()

    asyncio.run(main())


def test_an_error_arrives_with_its_reason(tmp_path: Path) -> None:
    async def refuse(requests: Any, context: Any) -> None:
        await context.read()
        await context.write(b"last")
        await context.abort_with_status(to_status(Unavailable("no more", reason=Reason.SHUTTING_DOWN)))

    async def main() -> None:
        async with served(tmp_path, refuse) as (_, address):
            stream = call(address)
            await stream.write(b"a")
            assert await stream.code() is grpc.StatusCode.UNAVAILABLE, "also while nothing has been read"
            assert await stream.details() == "no more"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.write(b"b")
            assert from_rpc_error(caught.value).reason is Reason.SHUTTING_DOWN

    asyncio.run(main())


def test_messages_before_the_end_are_read_first(tmp_path: Path) -> None:
    async def some(requests: Any, context: Any) -> None:
        await context.read()
        for number in range(3):
            await context.write(b"%d" % number)

    async def main() -> None:
        async with served(tmp_path, some) as (_, address):
            stream = call(address)
            await stream.write(b"a")
            assert [await stream.read() for _ in range(3)] == [b"0", b"1", b"2"]
            assert await stream.read() is EOF
            assert await stream.code() is grpc.StatusCode.OK

    asyncio.run(main())


def test_a_bug_in_a_handler_ends_its_stream_alone(tmp_path: Path) -> None:
    async def break_down(requests: Any, context: Any) -> None:
        if await context.read() == b"bad":
            raise ValueError("a bug")
        await context.write(b"well")
        await context.read()

    async def main() -> None:
        async with served(tmp_path, break_down) as (_, address):
            good, bad = call(address), call(address)
            await good.write(b"good")
            await bad.write(b"bad")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await bad.read()
            assert caught.value.code() is grpc.StatusCode.UNKNOWN
            assert await good.read() == b"well"
            good.cancel()

    asyncio.run(main())


def test_the_handler_of_a_caller_that_is_gone_is_cancelled(tmp_path: Path) -> None:
    ended = []

    async def wait(requests: Any, context: Any) -> None:
        await context.write(b"begun")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def main() -> None:
        async with served(tmp_path, wait) as (_, address):
            stream = call(address)
            assert await stream.read() == b"begun"
            stream.cancel()
            await until(lambda: bool(ended))

    asyncio.run(main())


def test_a_write_waits_for_who_does_not_read(tmp_path: Path) -> None:
    may_read = asyncio.Event()

    async def rest(requests: Any, context: Any) -> None:
        await may_read.wait()
        while await context.read() is not EOF:
            pass

    async def main() -> None:
        async with served(tmp_path, rest) as (_, address):
            stream = call(address)
            num_written = 0

            async def write() -> None:
                nonlocal num_written
                for _ in range(64):
                    await stream.write(bytes(1 << 20))
                    num_written += 1

            writing = asyncio.create_task(write())
            done, _ = await asyncio.wait((writing,), timeout=0.5)
            assert not done
            assert num_written <= 16
            may_read.set()
            await writing
            stream.cancel()

    asyncio.run(main())


def test_who_cannot_prove_himself_is_refused(tmp_path: Path) -> None:
    asked = []

    def prove(method: str, metadata: tuple[tuple[str, str], ...]) -> None:
        asked.append((method, metadata))
        if dict(metadata).get("authorization") != "Bearer right":
            raise Unauthenticated("the token is not known here")

    async def main() -> None:
        async with served(tmp_path, prove=prove) as (_, address):
            for authorization in ("", "Bearer wrong"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(address, authorization=authorization).read()
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            stream = call(address, authorization="Bearer right")
            await stream.write(b"a")
            assert await stream.read() == b"a!"
            stream.cancel()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(address, "/s/Other", "Bearer right").read()
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(main())
    assert asked[0] == (METHOD, ())


def test_a_first_frame_that_opens_nothing_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path) as (_, address):
            path = find_socket(address)
            _, end = await asyncio.get_running_loop().create_unix_connection(Frames, path)
            await end.write(Kind.MESSAGE, b"a")
            frame = await end.read()
            assert frame is not None
            assert frame[0] is Kind.END
            assert await end.read() is None

    asyncio.run(main())


def test_streams_get_time_to_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with served(tmp_path) as (server, address):
            stream, idle = call(address), call(address)
            for each in (stream, idle):
                await each.write(b"a")
                assert await each.read() == b"a!"
            stopping = asyncio.create_task(server.stop(0.2))
            await stream.write(b"b")
            assert await stream.read() == b"b!"
            stream.cancel()
            await stopping
            with pytest.raises(grpc.aio.AioRpcError):
                await idle.read()
            assert find_socket(address) is None

    asyncio.run(main())
