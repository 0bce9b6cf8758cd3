"""A process that sends every message back: what a hop to another process costs, with nothing done there.

python -m benchmarks.echo FOLDER        the other process; it ends when its standard input closes
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

ROOT = Path(__file__).resolve().parent.parent
METHOD = "/benchmarks.Echo/Echo"
MAX_MESSAGE = 64 << 20
TRIES, SKIPPED = 60, 10
OPTIONS = (("grpc.max_receive_message_length", MAX_MESSAGE), ("grpc.max_send_message_length", MAX_MESSAGE))


def receive(connection: socket.socket, into: memoryview) -> bool:
    """Fills `into`. False when the other side has closed."""
    done = 0
    while done < len(into):
        count = connection.recv_into(into[done:])
        if not count:
            return False
        done += count
    return True


class Echo:
    """The other process, as an async context manager, and the time a message takes there and back."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="echo-")
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        command = (sys.executable, "-m", "benchmarks.echo", self._folder.name)
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=ROOT)
        assert self._process.stdout is not None
        if await self._process.stdout.readline() != b"READY\n":
            raise RuntimeError("the echo process ended before it was ready")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()
        self._folder.cleanup()

    def socket_seconds(self, num_bytes: int) -> float:
        """The shortest of many tries over a bare Unix socket; both sides block."""
        message, back = bytes(num_bytes), memoryview(bytearray(num_bytes))
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(f"{self._folder.name}/bare")
            connection.sendall(num_bytes.to_bytes(8, "little"))
            times = []
            for _ in range(TRIES):
                begin = time.perf_counter()
                connection.sendall(message)
                receive(connection, back)
                times.append(time.perf_counter() - begin)
        return min(times[SKIPPED:])

    async def grpc_seconds(self, num_bytes: int) -> float:
        """The shortest of many tries over one stream of grpc.aio on a Unix socket."""
        message, times = bytes(num_bytes), []
        async with grpc.aio.insecure_channel(f"unix:{self._folder.name}/grpc", options=OPTIONS) as channel:
            call: Any = channel.stream_stream(METHOD)()
            for _ in range(TRIES):
                begin = time.perf_counter()
                await call.write(message)
                await call.read()
                times.append(time.perf_counter() - begin)
            await call.done_writing()
            await call.read()
        return min(times[SKIPPED:])


def _serve_bare(server: socket.socket) -> None:
    with server:
        while True:
            connection, _ = server.accept()
            with connection, contextlib.suppress(ConnectionError):
                size = bytearray(8)
                receive(connection, memoryview(size))
                message = memoryview(bytearray(int.from_bytes(size, "little")))
                while receive(connection, message):
                    connection.sendall(message)


async def _serve(folder: Path) -> None:
    async def echo(requests: Any, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)

    server = grpc.aio.server(options=OPTIONS)
    _, service, method = METHOD.split("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(f"unix:{folder}/grpc")
    await server.start()
    bare = socket.socket(socket.AF_UNIX)
    bare.bind(f"{folder}/bare")
    bare.listen()
    threading.Thread(target=_serve_bare, args=(bare,), daemon=True).start()
    print("READY", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
