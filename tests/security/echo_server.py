"""`python -m tests.security.echo_server [CERTIFICATE KEY]`: a server of its own process to be abused, without a model.

Prints READY and its address. `Echo/Unary` answers at once, `Echo/Endless` sends without end.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf import empty_pb2, wrappers_pb2

from grokmoe.security import SecuritySettings
from grokmoe.server import RoleServer, Service, server_stream, unary

PART = wrappers_pb2.BytesValue(value=bytes(64 * 1024))


async def answer(request: Any, context: Any) -> Any:
    return request


async def endless(request: Any, context: Any) -> AsyncIterator[Any]:
    while True:
        yield PART


async def main(certificate: str = "", key: str = "") -> None:
    handlers = {
        "Unary": unary(answer, empty_pb2.Empty, empty_pb2.Empty),
        "Endless": server_stream(endless, empty_pb2.Empty, wrappers_pb2.BytesValue),
    }
    server = RoleServer(
        [Service("test.Echo", handlers)], SecuritySettings(tls_certificate=certificate, tls_key=key, max_calls=64)
    )
    address = await server.start("127.0.0.1:0")
    print("READY", address, flush=True)  # noqa: T201 - read by the test
    await asyncio.to_thread(sys.stdin.read)  # until its parent has gone or wants it to end
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
