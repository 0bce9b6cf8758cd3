"""Addresses: what is understood, what is not, and that the calls of several servers are spread over healthy ones."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from grokmoe import AsyncClient, Client, ConfigError, Unavailable
from grokmoe.target import parse_target
from tests.shared.client_calls import Ask, ask_async, ask_sync
from tests.shared.fake_generation import FakeServer

BOUND = 10.0
"""Seconds within which a client must have noticed a change of health."""


@contextlib.contextmanager
def servers(count: int) -> Iterator[list[FakeServer]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(FakeServer()) for _ in range(count)]


def asked(fakes: list[FakeServer]) -> list[int]:
    return [len(fake.generation.requests) for fake in fakes]


def port(fake: FakeServer) -> str:
    return fake.address.rpartition(":")[2]


@pytest.mark.parametrize("ask", [ask_sync, ask_async])
@pytest.mark.parametrize(
    "join",
    [
        lambda fakes: ",".join(fake.address for fake in fakes),
        lambda fakes: ", ".join(f"localhost:{port(fake)}" for fake in fakes),
        lambda fakes: [fake.address for fake in fakes],
        lambda fakes: "ipv4:" + ",".join(fake.address for fake in fakes),
    ],
    ids=["commas", "names", "sequence", "scheme"],
)
def test_calls_go_round(ask: Ask, join: Any) -> None:
    with servers(3) as fakes:
        address = join(fakes)
        if ask is ask_sync:
            with Client(address, retries=0) as client:
                client.wait_ready(BOUND)
                until_all_are_used(client, fakes)
                before = asked(fakes)
                for _ in range(30):
                    client.generate("x")
                # A new address list begins the round anew; most of them are whole.
                assert all(now - then >= 8 for now, then in zip(asked(fakes), before, strict=True))
        else:
            assert ask(address, "generate", "x").text == "Hello"
            assert sum(asked(fakes)) == 1


def until_all_are_used(client: Client, fakes: list[FakeServer]) -> None:
    """Connections are made one by one; the first is used before the last is there."""
    deadline = time.monotonic() + BOUND
    while not all(asked(fakes)):
        assert time.monotonic() < deadline, asked(fakes)
        client.generate("x")


def test_a_server_that_does_not_serve_gets_no_calls() -> None:
    with servers(2) as fakes, Client([fake.address for fake in fakes], retries=0) as client:
        client.wait_ready(BOUND)
        until_all_are_used(client, fakes)
        fakes[0].set_serving(False)
        deadline = time.monotonic() + BOUND
        while True:
            before = asked(fakes)[0]
            for _ in range(6):
                client.generate("x")
            if asked(fakes)[0] == before:
                break
            assert time.monotonic() < deadline, "still asked"
        fakes[0].set_serving(True)
        deadline = time.monotonic() + BOUND
        while asked(fakes)[0] == before:
            assert time.monotonic() < deadline, "not asked again"
            client.generate("x")


def test_a_server_that_goes_costs_no_call() -> None:
    with servers(2) as fakes, Client([fake.address for fake in fakes]) as client:
        client.wait_ready(BOUND)
        until_all_are_used(client, fakes)
        fakes[1].stop()
        for _ in range(20):
            assert client.generate("x").text == "Hello"


def test_none_of_them_serves() -> None:
    with servers(2) as fakes:
        for fake in fakes:
            fake.set_serving(False)
        with pytest.raises(Unavailable):
            ask_sync([fake.address for fake in fakes], "generate", "x")
        assert asked(fakes) == [0, 0]
        # A single server is asked all the same: its status is of interest just then.
        assert ask_sync(fakes[0].address, "status").steps == 3


def test_a_name_with_dns() -> None:
    with FakeServer() as fake:
        assert ask_sync(f"dns:///localhost:{port(fake)}", "generate", "x").text == "Hello"
        fake.set_serving(False)
        with pytest.raises(Unavailable):
            ask_sync(f"dns:///localhost:{port(fake)}", "generate", "x")


def test_a_name_that_nobody_has() -> None:
    with pytest.raises(Unavailable, match=r"no-such-host\.invalid"):
        ask_sync("no-such-host.invalid:1,127.0.0.1:2", "generate", "x")
    with pytest.raises(Unavailable):
        ask_sync("no-such-host.invalid:1", "generate", "x")


@pytest.mark.parametrize(
    "address",
    ["", [], "a:1,", ",", "a:1,b", "a:1,unix:/x", ["unix:/a", "unix:/b"], "a:x,b:1", "::1:5,::1:6", ["a:1", ""]],
)
def test_addresses_that_cannot_be(address: Any) -> None:
    for kind in (AsyncClient, Client):
        with pytest.raises(ConfigError, match="address"):
            kind(address)


def test_addresses_of_two_kinds() -> None:
    with pytest.raises(ConfigError, match="neither all have"):
        parse_target("127.0.0.1:1,[::1]:2").uri()
    assert parse_target("[::1]:1,[::1]:2").uri() == "ipv6:[::1]:1,[::1]:2"
    assert parse_target(["127.0.0.1:1", "127.0.0.2:2"]).uri() == "ipv4:127.0.0.1:1,127.0.0.2:2"


@pytest.mark.parametrize(
    ("address", "is_local"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("unix:/tmp/x", True),
        ("unix:///tmp/x", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("ipv4:127.0.0.1:1,10.0.0.2:1", False),
        ("127.0.0.1:1,127.0.0.1:2", True),
        ("127.0.0.1:1,10.0.0.1:2", False),
        ("localhost.example.com:1", False),
        ("dns:///example.com:1", False),
        ("dns://127.0.0.1/example.com:1", False),
        ("0.0.0.0:1", False),
        ("example.com", False),
    ],
)
def test_what_stays_on_this_host(address: str, is_local: bool) -> None:
    assert parse_target(address).is_local is is_local
