"""Bearer tokens over real calls: who is let through to what, under which name."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import empty_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import grokmoe
from grokmoe import AsyncClient, PermissionDenied, Unauthenticated
from grokmoe.access import Scope
from grokmoe.channel import open_channel
from grokmoe.security import SecuritySettings
from grokmoe.server import RoleServer, Service, raw_stream, server_stream, unary
from router.admission import AdmissionSettings
from router.call_context import read_call
from router.control import ControlService
from router.engine import Engine
from router.service import GenerationService
from tests.router.served import TOKENIZER
from tests.router.tiny import attention_link, serving

ALICE, BOB, OPERATOR, ROUTER = (f"{name}-0123456789abcdef" for name in ("alice", "bob", "operator", "router"))
LINES = f"""
alice:{ALICE}
bob:{BOB}
operator:inference+control:{OPERATOR}
router:cluster:{ROUTER}
"""
EMPTY = empty_pb2.Empty
UNARY, STREAM, RAW = "/test.Names/Unary", "/test.Names/Stream", "/test.Names/Raw"


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(LINES)
    return path


def bearer(token: str | None) -> Any:
    return None if token is None else (("authorization", f"Bearer {token}"),)


class Names:
    """Says who calls, in every kind of method; `priority` as the router reads it."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.callers: list[str] = []

    async def unary(self, request: Any, context: Any) -> Any:
        self.note(context)
        return EMPTY()

    async def stream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.note(context)
        yield EMPTY()
        self.note(context)

    async def raw(self, requests: Any, context: Any) -> None:
        while await context.read() is not grpc.aio.EOF:
            self.note(context)
            await context.write(b"")

    def note(self, context: Any) -> None:
        self.callers.append(read_call(context).caller)

    def as_service(self, scope: Scope) -> Service:
        handlers = {
            "Unary": unary(self.unary, EMPTY, EMPTY),
            "Stream": server_stream(self.stream, EMPTY, EMPTY),
            "Raw": raw_stream(self.raw),
        }
        return Service("test.Names", handlers, scope=scope)


@contextlib.asynccontextmanager
async def names(
    security: SecuritySettings, scope: Scope = Scope.INFERENCE
) -> AsyncIterator[tuple[Names, Any, RoleServer]]:
    service, refused = Names(), []
    server = RoleServer([service.as_service(scope)], security, refused=refused.append)
    channel = open_channel(await server.start("127.0.0.1:0"))
    server.refused = refused  # type: ignore[attr-defined]
    try:
        yield service, channel, server
    finally:
        await channel.close(None)
        await server.stop(0)


async def call_all(channel: Any, metadata: Any) -> list[grpc.StatusCode]:
    """How a call of each kind ends."""
    codes = [await channel.unary_unary(UNARY)(b"", metadata=metadata).code()]
    stream = channel.unary_stream(STREAM)(b"", metadata=metadata)
    with contextlib.suppress(grpc.aio.AioRpcError):
        _ = [message async for message in stream]
    codes.append(await stream.code())
    call = channel.stream_stream(RAW)(metadata=metadata)
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.write(b"")
        await call.read()
        await call.done_writing()
    codes.append(await call.code())
    return codes


OK, NOBODY, NOT_YOU = (
    [code] * 3 for code in (grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
)


def test_who_is_let_through(tokens_file: Path) -> None:
    async def main() -> None:
        async with names(SecuritySettings(tokens_file=str(tokens_file)), Scope.CONTROL) as (service, channel, server):
            for metadata in (
                None,
                (("authorization", ""),),
                (("authorization", "Bearer"),),
                (("authorization", f"Basic {OPERATOR}"),),
                (("authorization", OPERATOR),),
                (("authorization", f"Bearer {OPERATOR}x"),),
                (("authorization", f"Bearer {OPERATOR} {OPERATOR}"),),
                (("authorization", f"Bearer {OPERATOR}"), ("authorization", f"Bearer {ALICE}")),
                (("authorization", f"Bearer {'x' * 4000}"),),
                (("authorization-bin", OPERATOR.encode()),),
            ):
                assert await call_all(channel, metadata) == NOBODY, metadata
            assert await call_all(channel, bearer(ALICE)) == NOT_YOU
            assert await call_all(channel, bearer(ROUTER)) == NOT_YOU
            assert service.callers == []
            assert set(server.refused) == {"UNAUTHENTICATED", "PERMISSION_DENIED"}  # type: ignore[attr-defined]
            assert await call_all(channel, bearer(OPERATOR)) == OK
            assert await call_all(channel, (("authorization", f"bearer {OPERATOR}"),)) == OK

    run(main())


def test_the_name_of_the_token_is_the_caller_whatever_the_call_claims(tokens_file: Path) -> None:
    async def main() -> None:
        async with names(SecuritySettings(tokens_file=str(tokens_file))) as (service, channel, _):

            async def call(token: str) -> None:
                assert await call_all(channel, (*bearer(token), ("x-caller", "operator"))) == OK

            await asyncio.gather(*(call(token) for token in (ALICE, BOB) * 10))
            assert sorted(service.callers) == ["alice"] * 40 + ["bob"] * 40

    run(main())


def test_without_tokens_nobody_is_asked_and_nobody_has_a_name() -> None:
    async def main() -> None:
        async with names(SecuritySettings()) as (service, channel, _):
            assert await call_all(channel, bearer(ALICE)) == OK
            assert service.callers == [""] * 4

    run(main())


def test_a_refused_stream_ends_before_its_first_message(tokens_file: Path) -> None:
    async def main() -> None:
        async with names(SecuritySettings(tokens_file=str(tokens_file))) as (_, channel, _server):
            call = channel.stream_stream(RAW)()
            assert await asyncio.wait_for(call.code(), 10) is grpc.StatusCode.UNAUTHENTICATED

    run(main())


def test_who_is_not_known_is_not_told_what_there_is(tokens_file: Path) -> None:
    async def main() -> None:
        async with names(SecuritySettings(tokens_file=str(tokens_file))) as (_, channel, _server):
            for method in (UNARY, "/test.Names/Nothing", "/nothing.At/All", "/grpc.health.v1.Health"):
                assert await channel.unary_unary(method)(b"").code() is grpc.StatusCode.UNAUTHENTICATED
            nothing = channel.unary_unary("/test.Names/Nothing")(b"", metadata=bearer(ALICE))
            assert await nothing.code() is grpc.StatusCode.UNIMPLEMENTED

    run(main())


def test_a_method_may_have_a_scope_of_its_own(tokens_file: Path) -> None:
    async def main() -> None:
        service = Names()
        handlers = {"Unary": unary(service.unary, EMPTY, EMPTY), "Other": unary(service.unary, EMPTY, EMPTY)}
        described = Service("test.Names", handlers, method_scopes={"Other": Scope.CONTROL})
        server = RoleServer([described], SecuritySettings(tokens_file=str(tokens_file)))
        channel = open_channel(await server.start("127.0.0.1:0"))
        try:
            codes = {
                (name, token): await channel.unary_unary(f"/test.Names/{name}")(b"", metadata=bearer(token)).code()
                for name in handlers
                for token in (ALICE, OPERATOR)
            }
        finally:
            await channel.close(None)
            await server.stop(0)
        assert [key for key, code in codes.items() if code is not grpc.StatusCode.OK] == [("Other", ALICE)]

    run(main())


@pytest.mark.parametrize(
    ("reflection", "without", "with_token"),
    [("guarded", "UNAUTHENTICATED", "OK"), ("open", "OK", "OK"), ("off", "UNAUTHENTICATED", "UNIMPLEMENTED")],
)
def test_health_needs_no_token_and_reflection_as_set(
    tokens_file: Path, reflection: str, without: str, with_token: str
) -> None:
    async def main() -> None:
        security = SecuritySettings(tokens_file=str(tokens_file), reflection=reflection)
        async with names(security) as (_, channel, server):
            await server.set_ready(True)
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(service="test.Names"))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
            for token, code in ((None, without), (ALICE, with_token)):
                stub = reflection_pb2_grpc.ServerReflectionStub(channel)
                call = stub.ServerReflectionInfo(
                    iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=bearer(token)
                )
                with contextlib.suppress(grpc.aio.AioRpcError):
                    _ = [answer async for answer in call]
                assert (await call.code()).name == code

    run(main())


def test_a_token_that_is_taken_out_of_the_file_is_refused_and_a_new_one_works(
    tokens_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grokmoe.watched_file.CHECK_INTERVAL", 0.0)

    def replace_token() -> None:
        tokens_file.write_text(LINES.replace(ALICE, ALICE + "-new"))

    async def main() -> None:
        async with names(SecuritySettings(tokens_file=str(tokens_file))) as (_, channel, _server):
            assert await call_all(channel, bearer(ALICE)) == OK
            replace_token()
            assert await call_all(channel, bearer(ALICE)) == NOBODY
            assert await call_all(channel, bearer(ALICE + "-new")) == OK

    run(main())


@contextlib.asynccontextmanager
async def generation(tokens_file: Path, **options: Any) -> AsyncIterator[tuple[Engine, str]]:
    async with serving(attention_link(), **options) as engine:
        services = [
            GenerationService(engine, TOKENIZER, "tiny", "float32").as_service(),
            ControlService(engine).as_service(),
        ]
        server = RoleServer(services, SecuritySettings(tokens_file=str(tokens_file)))
        try:
            yield engine, await server.start("127.0.0.1:0")
        finally:
            await server.stop(0)


async def all_of_inference(client: AsyncClient) -> None:
    await client.generate("hello", max_tokens=2)
    async with client.stream("hello", max_tokens=2) as stream:
        await stream.completion()
    await client.score("hello")
    await client.tokenize("hello")
    await client.detokenize([5, 6])
    await client.model()


def test_inference_and_control_of_the_router(tokens_file: Path) -> None:
    async def main() -> None:
        async with generation(tokens_file) as (_, address):
            async with AsyncClient(address, token=ALICE) as alice, AsyncClient(address, token=OPERATOR) as operator:
                await all_of_inference(alice)
                await all_of_inference(operator)
                await operator.status()
                await operator.abort(["x"])
                for call in (alice.status(), alice.abort(["x"])):
                    with pytest.raises(PermissionDenied, match="the token of alice is not for control"):
                        await call
            async with AsyncClient(address) as nobody, AsyncClient(address, token="x" * 20) as stranger:
                for client in (nobody, stranger):
                    with pytest.raises(Unauthenticated) as caught:
                        await client.generate("hello")
                    assert caught.value.reason is grokmoe.Reason.UNAUTHENTICATED
                    with pytest.raises(Unauthenticated):
                        await client.stream("hello").completion()
                    with pytest.raises(Unauthenticated):
                        await client.status()

    run(main())


def test_a_caller_cannot_take_more_than_its_share_under_another_name(tokens_file: Path) -> None:
    async def main() -> None:
        limit = AdmissionSettings(max_live_per_caller=1)
        async with generation(tokens_file, admission=limit) as (_, address):
            first = AsyncClient(address, token=ALICE)
            second = AsyncClient(address, token=ALICE, metadata={"x-caller": "bob"}, retries=0)
            third = AsyncClient(address, token=BOB, metadata={"x-caller": "alice"})
            async with first, second, third:
                stream = first.stream("hello", max_tokens=400, ignore_eos=True, stop_token_ids=[])
                await stream.__anext__()
                with pytest.raises(grokmoe.ResourceExhausted) as caught:
                    await second.generate("hello", max_tokens=1)
                assert caught.value.reason is grokmoe.Reason.CALLER_LIMIT
                await third.generate("hello", max_tokens=1)
                await stream.aclose()

    run(main())
