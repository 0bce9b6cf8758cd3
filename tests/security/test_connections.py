"""Connections that are abused, over real sockets: they are closed or cost little, and neighbours do not notice.

The frames are HTTP/2's (RFC 9113), written by hand: no library would send them so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

import grokmoe.server
from grokmoe.channel import MAX_HANDSHAKE_MS, MAX_PING_STRIKES, MAX_REQUEST_BYTES, open_channel
from tests.router.tiny import until
from tests.security.echo_server import PART
from tests.security.test_tokens import RAW, UNARY, names

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""What a client begins with: these words and settings that change nothing."""

DATA, HEADERS, PING = 0, 1, 6
END_HEADERS = 4
TOO_MANY_PINGS = b"too_many_pings"
HALF_A_CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"

SLOWEST = 2.0
"""Seconds that a neighbour's call may take. It takes a millisecond; the machine may be busy with other tests."""


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 120))


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def headers(path: str) -> bytes:
    """Of a gRPC call, every one a literal (RFC 7541, section 6.2.2)."""
    pairs = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    pairs["content-type"] = "application/grpc"
    return b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in pairs.items()
    )


def announced(stream: int, size: int, path: str = "/test.Echo/Unary") -> bytes:
    """The begin of a call whose message of `size` bytes never comes."""
    prefix = b"\0" + struct.pack(">I", size)
    return frame(HEADERS, END_HEADERS, stream, headers(path)) + frame(DATA, 0, stream, prefix)


class Child:
    """An echo server as a process, and what it holds."""

    def __init__(self, *args: str, descriptors: int | None = None) -> None:
        command = [sys.executable, "-m", "tests.security.echo_server", *args]
        if descriptors is not None:
            command = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *command]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().split()[1].decode()
        host, _, port = self.address.rpartition(":")
        self._at = (host, int(port))

    def connect(self, data: bytes = b"") -> socket.socket:
        connection = socket.create_connection(self._at)
        connection.settimeout(MAX_HANDSHAKE_MS / 1000 + 10)
        connection.sendall(data)
        return connection

    @property
    def num_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def mebibytes(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def close(self) -> None:
        self.process.communicate(timeout=10)
        assert self.process.returncode == 0


@contextlib.contextmanager
def child(*args: str, descriptors: int | None = None) -> Iterator[Child]:
    there = Child(*args, descriptors=descriptors)
    try:
        yield there
    finally:
        there.close()


@contextlib.asynccontextmanager
async def neighbour(address: str, credentials: grpc.ChannelCredentials | None = None) -> AsyncIterator[None]:
    """A client that calls all the time meanwhile. Every call must be answered, none too late."""
    slowest, is_over = 0.0, False
    channel: Any = open_channel(address, credentials=credentials)

    async def call_on() -> None:
        nonlocal slowest
        while not is_over:
            begin = time.perf_counter()
            await channel.unary_unary("/test.Echo/Unary")(b"", timeout=30)
            slowest = max(slowest, time.perf_counter() - begin)
            await asyncio.sleep(0.01)

    await channel.unary_unary("/test.Echo/Unary")(b"", timeout=30)
    calling = asyncio.create_task(call_on())
    try:
        yield
        is_over = True
        await calling
        assert slowest < SLOWEST
    finally:
        calling.cancel()
        await channel.close()


def received(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    return data


async def seconds_until_closed(connection: socket.socket) -> float:
    begin = time.perf_counter()
    await asyncio.to_thread(received, connection)
    return time.perf_counter() - begin


def close_all(connections: list[socket.socket]) -> None:
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("is_tls", [False, True])
def test_who_does_not_finish_to_connect_is_sent_away(is_tls: bool, tmp_path: Path) -> None:
    args: tuple[str, ...] = ()
    credentials = None
    beginnings = [b"", PREFACE[:10], PREFACE[:24]]
    if is_tls:
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1")
        issued.cert_chain_pems[0].write_to_path(str(tmp_path / "pem"))
        issued.private_key_pem.write_to_path(str(tmp_path / "key"))
        args = (str(tmp_path / "pem"), str(tmp_path / "key"))
        credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        beginnings = [b"", HALF_A_CLIENT_HELLO, b"\x16"]

    async def main() -> None:
        with child(*args) as there:
            before = there.num_descriptors
            async with neighbour(there.address, credentials):
                connections = [there.connect(data) for data in beginnings for _ in range(10)]
                seconds = await asyncio.gather(*map(seconds_until_closed, connections))
                assert max(seconds) < MAX_HANDSHAKE_MS / 1000 + 20
            close_all(connections)
            await until(lambda: there.num_descriptors <= before)

    run(main())


def test_who_probes_too_often_is_sent_away() -> None:
    async def main() -> None:
        with child() as there:
            async with neighbour(there.address):
                connection = there.connect(PREFACE)
                for number in range(MAX_PING_STRIKES + 2):
                    connection.sendall(frame(PING, 0, 0, struct.pack(">Q", number)))
                data = await asyncio.to_thread(received, connection)
                assert TOO_MANY_PINGS in data
                connection.close()

    run(main())


def test_a_thousand_idle_connections_cost_little_and_are_given_back() -> None:
    async def main() -> None:
        with child() as there:
            async with neighbour(there.address):
                before, memory = there.num_descriptors, there.mebibytes
                connections = [there.connect(PREFACE) for _ in range(1000)]
                await until(lambda: there.num_descriptors >= before + 1000)
                assert there.mebibytes - memory < 64
                close_all(connections)
                await until(lambda: there.num_descriptors <= before)

    run(main())


def test_connections_never_take_all_descriptors() -> None:
    async def main() -> None:
        with child(descriptors=128) as there:
            async with neighbour(there.address):
                connections = [there.connect(PREFACE) for _ in range(200)]
                await until(lambda: there.num_descriptors >= 64)
                closed = await asyncio.gather(*(asyncio.to_thread(received, each) for each in connections[64:]))
                assert len(closed) == 136
                assert there.num_descriptors < 100
                close_all(connections)
            async with neighbour(there.address):  # there is room again
                pass

    run(main())


def test_an_announced_message_takes_no_memory_before_it_comes() -> None:
    async def main() -> None:
        with child() as there:
            async with neighbour(there.address):
                before, memory = there.num_descriptors, there.mebibytes
                streams = range(1, 2 * 64, 2)  # as many as one connection may have
                calls = b"".join(announced(stream, MAX_REQUEST_BYTES - 100) for stream in streams)
                connections = [there.connect(PREFACE + calls) for _ in range(8)]
                await until(lambda: there.num_descriptors >= before + 8)
                await asyncio.sleep(0.2)
                assert there.mebibytes - memory < 64  # of two gibibytes announced
                close_all(connections)
                await until(lambda: there.num_descriptors <= before)

    run(main())


def test_a_stream_that_nobody_reads_takes_no_more_than_the_window() -> None:
    async def main() -> None:
        with child() as there:
            async with neighbour(there.address):
                channel: Any = open_channel(there.address)
                calls = [channel.unary_stream("/test.Echo/Endless")(b"") for _ in range(20)]
                first = [await call.read() for call in calls]
                assert all(message == PART.SerializeToString() for message in first)
                memory = there.mebibytes
                await asyncio.sleep(1)  # unread: without a bound it would write some hundred mebibytes
                assert there.mebibytes - memory < 32
                await channel.close()

    run(main())


def short(monkeypatch: pytest.MonkeyPatch, name: str, options: tuple[tuple[str, int], ...]) -> None:
    """The same mechanism with times that a test can wait for."""
    assert {key for key, _ in getattr(grokmoe.server, name)} == {key for key, _ in options}
    monkeypatch.setattr(grokmoe.server, name, options)


def test_who_has_vanished_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls are cancelled. A socket that answers no probe stands for a machine that is gone."""
    times = {"grpc.keepalive_time_ms": 1000, "grpc.keepalive_timeout_ms": 1000, "grpc.http2.ping_timeout_ms": 1000}
    short(monkeypatch, "CONNECTION_OPTIONS", tuple(times.items()))

    async def main() -> None:
        async with names(grokmoe.server.SecuritySettings()) as (_, channel, server):
            host, _, port = server.address.rpartition(":")
            connection = await asyncio.to_thread(socket.create_connection, (host, int(port)))
            connection.settimeout(30)
            connection.sendall(PREFACE + announced(1, 100, RAW))
            assert await seconds_until_closed(connection) < 20
            connection.close()
            assert await channel.unary_unary(UNARY)(b"").code() is grpc.StatusCode.OK

    run(main())


def test_an_idle_connection_is_closed_and_the_next_call_opens_another(monkeypatch: pytest.MonkeyPatch) -> None:
    short(monkeypatch, "CLIENT_CONNECTION_OPTIONS", (("grpc.max_connection_idle_ms", 500),))

    async def main() -> None:
        async with names(grokmoe.server.SecuritySettings()) as (_, channel, _server):
            for _ in range(3):
                assert await channel.unary_unary(UNARY)(b"").code() is grpc.StatusCode.OK
                state = channel.get_state()
                while state is grpc.ChannelConnectivity.READY:
                    await asyncio.wait_for(channel.wait_for_state_change(state), 30)
                    state = channel.get_state()

    run(main())
