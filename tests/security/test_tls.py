"""TLS on the server's side: who gets in, certificates that are replaced, health in the clear beside it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from grokmoe import TlsConfig
from grokmoe.channel import open_channel
from grokmoe.credentials import channel_credentials
from grokmoe.errors import ConfigError
from grokmoe.security import SecuritySettings
from grokmoe.server import RoleServer
from tests.security.certificates import Authority, Pair
from tests.security.test_tokens import UNARY, Names, Scope

OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def settings(own: Pair, client_ca: str = "", **more: Any) -> SecuritySettings:
    return SecuritySettings(tls_certificate=own.certificate, tls_key=own.key, tls_client_ca=client_ca, **more)


@contextlib.asynccontextmanager
async def serving(security: SecuritySettings) -> AsyncIterator[tuple[Names, RoleServer]]:
    names = Names()
    server = RoleServer([names.as_service(Scope.INFERENCE)], security)
    await server.start("127.0.0.1:0")
    try:
        yield names, server
    finally:
        await server.stop(0)


async def code_of(address: str, tls: TlsConfig | None, method: str = UNARY) -> grpc.StatusCode:
    async with open_channel(address, credentials=channel_credentials(tls) if tls else None) as channel:
        return await channel.unary_unary(method)(b"", timeout=10).code()


def test_tls(authority: Authority, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(settings(authority.server())) as (_, server):
            assert await code_of(server.address, authority.client()) is OK
            assert await code_of(server.address, None) is UNAVAILABLE
            assert await code_of(server.address, Authority(tmp_path, "other").client()) is UNAVAILABLE

    run(main())


def test_mutual_tls_lets_in_who_shows_a_certificate_and_takes_its_name(authority: Authority, tmp_path: Path) -> None:
    async def main() -> None:
        stranger = Authority(tmp_path, "other").issue("alice.example")
        async with serving(settings(authority.server(), authority.ca)) as (names, server):
            assert await code_of(server.address, authority.client()) is UNAVAILABLE
            assert await code_of(server.address, authority.client(stranger)) is UNAVAILABLE
            assert names.callers == []
            assert await code_of(server.address, authority.client(authority.issue("alice.example"))) is OK
            assert names.callers == ["alice.example"]

    run(main())


def serial_of(address: str, ca: str) -> str:
    """What certificate a new connection is shown."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        found: Any = secure.getpeercert()
        return str(found["serialNumber"])


def test_certificates_are_read_again(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grokmoe.watched_file.CHECK_INTERVAL", 0.0)

    def break_key(own: Pair) -> None:
        Path(own.key).write_text("half of a ke")

    async def main() -> None:
        own = authority.server()
        async with serving(settings(own)) as (_, server):

            async def serial() -> str:
                return await asyncio.to_thread(serial_of, server.address, authority.ca)

            async with open_channel(server.address, credentials=channel_credentials(authority.client())) as standing:
                assert await standing.unary_unary(UNARY)(b"").code() is OK
                first = await serial()
                assert await serial() == first
                authority.server()  # writes another certificate and key over the first
                second = await serial()
                assert second != first
                break_key(own)
                assert await serial() == second
                authority.server()
                assert await serial() not in (first, second)
                assert await standing.unary_unary(UNARY)(b"").code() is OK

    run(main())


def test_another_authority_for_callers_can_take_over(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grokmoe.watched_file.CHECK_INTERVAL", 0.0)
    other = Authority(tmp_path, "other")
    callers_ca = tmp_path / "callers.pem"
    callers_ca.write_bytes(Path(authority.ca).read_bytes())

    def take_over() -> None:
        callers_ca.write_bytes(Path(other.ca).read_bytes())

    async def main() -> None:
        old, new = authority.client(authority.issue("old")), authority.client(other.issue("new"))
        async with serving(settings(authority.server(), str(callers_ca))) as (_, server):
            assert [await code_of(server.address, tls) for tls in (old, new)] == [OK, UNAVAILABLE]
            take_over()
            assert [await code_of(server.address, tls) for tls in (old, new)] == [UNAVAILABLE, OK]

    run(main())


def test_health_in_the_clear_and_nothing_else_there(authority: Authority) -> None:
    async def main() -> None:
        security = settings(authority.server(), authority.ca, health_listen="127.0.0.1:0")
        async with serving(security) as (_, server):
            async with open_channel(server.health_address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                watch = stub.Watch(health_pb2.HealthCheckRequest(service="test.Names"))
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
                await server.set_ready(True)
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
                assert (
                    await stub.Check(health_pb2.HealthCheckRequest())
                ).status == health_pb2.HealthCheckResponse.SERVING
                watch.cancel()
            assert await code_of(server.health_address, None) is grpc.StatusCode.UNIMPLEMENTED
            reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
            assert await code_of(server.health_address, None, reflection) is grpc.StatusCode.UNIMPLEMENTED
            assert await code_of(server.address, None, "/grpc.health.v1.Health/Check") is UNAVAILABLE

    run(main())


def test_a_health_watcher_that_takes_nothing_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grokmoe.server.HEALTH_TIMEOUT", 0.05)

    async def main() -> None:
        async with serving(SecuritySettings()) as (_, server):
            health: Any = server._health
            held = health._server_watchers["test.Names"]  # as a watcher whose write does not return
            async with held:
                await server.set_ready(True)
                await asyncio.wait_for(server.stop(0), 10)

    run(main())


def test_files_that_cannot_be(authority: Authority, tmp_path: Path) -> None:
    own, other = authority.server(), Authority(tmp_path, "other").server()
    no_pem = tmp_path / "no.pem"
    no_pem.write_text("SECRET")
    for security, words in (
        (settings(Pair(own.certificate, other.key)), "tls_certificate .* with tls_key .*KEY_VALUES_MISMATCH"),
        (settings(Pair(str(no_pem), own.key)), "tls_certificate"),
        (settings(Pair(own.certificate, str(no_pem))), "tls_key"),
        (settings(Pair(own.certificate, "/nowhere")), "tls_key.* /nowhere"),
        (settings(own, str(no_pem)), "tls_client_ca"),
        (settings(own, "/nowhere"), "tls_client_ca .*nowhere"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            security.credentials()
        assert "SECRET" not in caught.value.message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tls_certificate": "x"}, "go together"),
        ({"tls_key": "x"}, "go together"),
        ({"tls_client_ca": "x"}, "tls_client_ca needs"),
        ({"max_calls": 0}, "max_calls is 0"),
        ({"max_connection_age": -1.0}, "max_connection_age is -1"),
        ({"max_connection_age": float("nan")}, "max_connection_age is nan"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SecuritySettings(**fields)


@pytest.mark.parametrize(
    ("listen", "fields", "words"),
    [
        ("127.0.0.1:1", {}, ""),
        ("unix:/tmp/x", {}, ""),
        ("[::1]:1", {}, ""),
        ("0.0.0.0:1", {}, "everyone who reaches 0.0.0.0:1 may call"),
        ("0.0.0.0:1", {"tokens_file": "t"}, "in the clear"),
        ("0.0.0.0:1", {"tokens_file": "t", "tls_certificate": "c", "tls_key": "k"}, ""),
        ("0.0.0.0:1", {"tls_certificate": "c", "tls_key": "k", "tls_client_ca": "a"}, ""),
        ("0.0.0.0:1", {"tls_certificate": "c", "tls_key": "k"}, "everyone"),
    ],
)
def test_what_is_open_to_a_network_is_said(
    listen: str, fields: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    SecuritySettings(**fields).warn(listen)
    assert (words in caplog.text) if words else not caplog.text
