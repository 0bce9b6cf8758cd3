"""Service.admit: calls that are refused before their message is read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import empty_pb2

from grokmoe import AsyncClient
from grokmoe.channel import open_channel
from grokmoe.errors import GrokmoeError, Reason, ResourceExhausted
from grokmoe.security import SecuritySettings
from grokmoe.server import RoleServer, Service, server_stream, unary
from grokmoe.status import from_rpc_error
from router.admission import AdmissionSettings
from tests.router.served import service
from tests.router.tiny import until

EMPTY = empty_pb2.Empty
METHODS = ("Unary", "Stream", "Other")


class Gate:
    """A service that refuses by method. `answered`: methods whose handlers ran."""

    def __init__(self) -> None:
        self.answered: list[str] = []
        self.errors: dict[str, Exception] = {}

    def admit(self, name: str) -> None:
        if name in self.errors:
            raise self.errors[name]

    async def unary(self, request: Any, context: Any) -> Any:
        self.answered.append("unary")
        return EMPTY()

    async def stream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.answered.append("stream")
        yield EMPTY()

    def as_service(self) -> Service:
        handlers = {
            "Unary": unary(self.unary, EMPTY, EMPTY),
            "Stream": server_stream(self.stream, EMPTY, EMPTY),
            "Other": unary(self.unary, EMPTY, EMPTY),
        }
        return Service("test.Gate", handlers, admit=self.admit)


@contextlib.asynccontextmanager
async def gate(security: SecuritySettings | None = None) -> AsyncIterator[tuple[Gate, Any]]:
    there = Gate()
    server = RoleServer([there.as_service()], security)
    channel = open_channel(await server.start("127.0.0.1:0"))
    try:
        yield there, channel
    finally:
        await channel.close(None)
        await server.stop(0)


async def ending(call: Any) -> GrokmoeError | None:
    try:
        await call.read() if hasattr(call, "read") else await call
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    return None


def test_a_refused_call_ends_with_the_error_and_others_go_on() -> None:
    async def main() -> None:
        async with gate() as (there, channel):
            full = ResourceExhausted("no room", retry_after=2.5, reason=Reason.QUEUE_FULL)
            there.errors = {"Unary": full, "Stream": full}
            for call in (
                channel.unary_unary("/test.Gate/Unary")(b""),
                channel.unary_unary("/test.Gate/Unary")(b"\xff no message"),
                channel.unary_stream("/test.Gate/Stream")(b""),
                channel.stream_stream("/test.Gate/Stream")(),  # whose message never comes
            ):
                error = await asyncio.wait_for(ending(call), 10)
                assert isinstance(error, ResourceExhausted)
                assert (error.message, error.retry_after, error.reason) == ("no room", 2.5, Reason.QUEUE_FULL)
            assert there.answered == []
            assert await ending(channel.unary_unary("/test.Gate/Other")(b"")) is None
            there.errors = {}
            assert await ending(channel.unary_unary("/test.Gate/Unary")(b"")) is None
            assert there.answered == ["unary", "unary"]
            nothing = channel.unary_unary("/test.Gate/Nothing")(b"")
            assert await nothing.code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(main())


def test_a_bug_in_it_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with gate() as (there, channel):
            there.errors = {"Unary": ValueError("a secret")}
            call = channel.unary_unary("/test.Gate/Unary")(b"")
            assert await call.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in await call.details()

    asyncio.run(main())
    assert "a secret" in caplog.text


def test_who_is_not_known_is_not_told_that_there_is_no_room(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("alice:0123456789abcdef")

    async def main() -> None:
        async with gate(SecuritySettings(tokens_file=str(tokens))) as (there, channel):
            there.errors = {"Unary": ResourceExhausted("no room")}
            assert await channel.unary_unary("/test.Gate/Unary")(b"").code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(main())


def test_a_full_queue_refuses_what_waits_and_nothing_else() -> None:
    async def main() -> None:
        async with service(admission=AdmissionSettings(max_waiting=1), max_running=1) as there:
            client: AsyncClient = there.client
            long = {"max_tokens": 400, "ignore_eos": True}
            running = client.stream("hello", **long)  # type: ignore[arg-type]
            await running.__anext__()
            waiting = asyncio.ensure_future(client.generate("hello", **long))  # type: ignore[arg-type]
            await until(lambda: there.engine.num_waiting == 1)
            before = there.engine.admission.num_refused
            for method in ("Generate", "StreamGenerate", "Score"):
                call = there.channel.unary_stream(f"/grokmoe.v1.Generation/{method}")(b"\xff no message")
                error = await ending(call)
                assert isinstance(error, ResourceExhausted)
                assert error.reason is Reason.QUEUE_FULL
            assert there.engine.admission.num_refused == before + 3
            counted = there.engine.metrics.requests.labels("RESOURCE_EXHAUSTED")._value.get()
            assert counted == 3
            assert await client.tokenize("hello")
            waiting.cancel()
            await running.aclose()

    asyncio.run(main())
