"""TLS, tokens and metadata, against real servers with certificates made for the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from grokmoe import AsyncClient, Client, ConfigError, TlsConfig, Unavailable
from tests.shared.client_calls import Ask, ask_async, ask_sync
from tests.shared.fake_generation import FakeServer


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(params=[ask_sync, ask_async])
def ask(request: pytest.FixtureRequest) -> Ask:
    return request.param


def chain(cert: trustme.LeafCert) -> bytes:
    return b"".join(pem.bytes() for pem in cert.cert_chain_pems)


def server_of(authority: trustme.CA, *names: str, mutual: bool = False) -> FakeServer:
    cert = authority.issue_cert(*names)
    credentials = grpc.ssl_server_credentials(
        [(cert.private_key_pem.bytes(), chain(cert))],
        root_certificates=authority.cert_pem.bytes() if mutual else None,
        require_client_auth=mutual,
    )
    return FakeServer(credentials=credentials)


@pytest.fixture
def secure(authority: trustme.CA) -> Iterator[FakeServer]:
    with server_of(authority, "127.0.0.1", "localhost") as server:
        yield server


def test_tls(secure: FakeServer, authority: trustme.CA, ask: Ask, tmp_path: Path) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for ca in (authority.cert_pem.bytes(), tmp_path / "ca.pem", str(tmp_path / "ca.pem")):
        answer = ask(secure.address, "generate", "x", client={"tls": TlsConfig(ca=ca)})
        assert answer.text == "Hello"
    ask(secure.address, "wait_ready", 10, client={"tls": TlsConfig(ca=authority.cert_pem.bytes())})


@pytest.mark.parametrize("tls", [None, True, TlsConfig(ca=trustme.CA().cert_pem.bytes())])
def test_a_server_that_nobody_known_vouches_for(secure: FakeServer, ask: Ask, tls: Any) -> None:
    with pytest.raises(Unavailable):
        ask(secure.address, "generate", "x", client={"tls": tls})
    assert secure.generation.requests == []


def test_a_client_with_tls_and_a_server_without(authority: trustme.CA, ask: Ask) -> None:
    with FakeServer() as server:
        with pytest.raises(Unavailable):
            ask(server.address, "generate", "x", client={"tls": TlsConfig(ca=authority.cert_pem.bytes())})
        assert server.generation.requests == []


def test_the_name_in_the_certificate(authority: trustme.CA, ask: Ask) -> None:
    ca = authority.cert_pem.bytes()
    with server_of(authority, "grokmoe.example") as server:
        with pytest.raises(Unavailable):
            ask(server.address, "generate", "x", client={"tls": TlsConfig(ca=ca)})
        tls = TlsConfig(ca=ca, server_name="grokmoe.example")
        assert ask(server.address, "generate", "x", client={"tls": tls}).text == "Hello"


def test_a_list_of_servers_with_tls(authority: trustme.CA) -> None:
    ca = authority.cert_pem.bytes()
    names = ("grokmoe.example",)
    with server_of(authority, *names) as one, server_of(authority, *names) as two:
        addresses = [one.address, two.address]
        with Client(addresses, tls=TlsConfig(ca=ca, server_name="grokmoe.example")) as client:
            client.wait_ready(10)
            for _ in range(200):
                client.generate("x")
                if one.generation.requests and two.generation.requests:
                    break
        assert one.generation.requests
        assert two.generation.requests
    with pytest.raises(ConfigError, match="server_name"):
        Client(addresses, tls=TlsConfig(ca=ca))


def test_mutual_tls(authority: trustme.CA, ask: Ask, tmp_path: Path) -> None:
    ca = authority.cert_pem.bytes()
    client = authority.issue_cert("client.example")
    stranger = trustme.CA().issue_cert("client.example")
    client.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    with server_of(authority, "127.0.0.1", mutual=True) as server:
        own = TlsConfig(ca, certificate=chain(client), key=tmp_path / "key.pem")
        assert ask(server.address, "generate", "x", client={"tls": own}).text == "Hello"
        seen = len(server.generation.requests)
        for tls in (TlsConfig(ca), TlsConfig(ca, chain(stranger), stranger.private_key_pem.bytes())):
            with pytest.raises(Unavailable):
                ask(server.address, "generate", "x", client={"tls": tls})
        assert len(server.generation.requests) == seen


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ca": "/nowhere/ca.pem"}, "ca /nowhere/ca.pem: No such file"),
        ({"ca": b"what"}, "ca is not in PEM format"),
        ({"certificate": b"x"}, "certificate and its key go together"),
        ({"key": b"x"}, "certificate and its key go together"),
    ],
)
def test_tls_that_cannot_be(options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AsyncClient("127.0.0.1:1", tls=TlsConfig(**options))


def test_a_key_is_not_shown() -> None:
    assert "SECRET" not in repr(TlsConfig(certificate=b"c", key=b"SECRET"))


def test_a_token_goes_with_every_call(ask: Ask) -> None:
    with FakeServer() as server:
        for method, args in {"generate": ("x",), "stream": ("x",), "model": (), "status": (), "abort": ("a",)}.items():
            ask(server.address, method, *args, client={"token": "sesame\n"})
        sent = [each.get("authorization") for each in server.generation.metadata]
        assert sent == ["Bearer sesame"] * 5


def test_a_token_over_tls(secure: FakeServer, authority: trustme.CA, ask: Ask) -> None:
    client = {"tls": TlsConfig(ca=authority.cert_pem.bytes()), "token": "sesame"}
    ask(secure.address, "generate", "x", client=client)
    assert secure.generation.metadata[0]["authorization"] == "Bearer sesame"


def test_a_token_that_changes_is_asked_for_before_every_attempt() -> None:
    tokens = iter(["one", "two", "three"])
    with FakeServer() as server:
        server.generation.failures = [Unavailable("away", 0.01)]
        with Client(server.address, token=lambda: next(tokens), metadata=lambda: {"X-Trace": "t"}) as client:
            client.generate("x")
            client.stream("x").completion()
        sent = [(each["authorization"], each["x-trace"]) for each in server.generation.metadata]
        assert sent == [("Bearer one", "t"), ("Bearer two", "t"), ("Bearer three", "t")]


def test_a_token_does_not_leave_the_host_in_the_clear() -> None:
    for address in ("example.com:1", "10.0.0.1:1", "127.0.0.1:1,10.0.0.1:1", "dns:///example.com:1"):
        with pytest.raises(ConfigError, match="a token needs tls"):
            Client(address, token="sesame")
        AsyncClient(address, token="sesame", allow_insecure_token=True)
        if "," not in address:
            AsyncClient(address, token="sesame", tls=True)
    for address in ("unix:/tmp/x", "localhost:1", "[::1]:1"):
        AsyncClient(address, token="sesame")


def test_metadata(ask: Ask) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with FakeServer() as server:
        ask(server.address, "generate", "x", client={"metadata": {"traceparent": trace, "extra-bin": b"\x00\xff"}})
        assert server.generation.metadata[0]["traceparent"] == trace
        assert server.generation.metadata[0]["extra-bin"] == b"\x00\xff"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metadata": {"a b": "x"}}, "'a b' is not a name"),
        ({"metadata": {"": "x"}}, "'' is not a name"),
        ({"metadata": {"a": "line\nbreak"}}, "a must be printable ASCII"),
        ({"metadata": {"a": b"x"}}, "a must be printable ASCII"),
        ({"metadata": {"a-bin": "x"}}, "a-bin must be bytes"),
        ({"token": "geheimnisvoll\u00fc"}, "authorization must be printable ASCII"),
        ({"metadata": lambda: {"a": "\u00fc"}}, "a must be printable ASCII"),
    ],
)
def test_metadata_that_cannot_be_sent(ask: Ask, options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        ask("127.0.0.1:1", "generate", "x", client=options)
    assert "geheim" not in str(caught.value)
