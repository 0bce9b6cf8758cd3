"""Which calls are tried again, when, and how often; and that nothing is after the first message."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import grokmoe
from grokmoe import AlreadyExists, AsyncClient, Client, Reason, ResourceExhausted, Unavailable
from grokmoe.retry import FIRST_BACKOFF, JITTER, MAX_BACKOFF, Attempts
from tests.shared.client_calls import Ask, ask_async, ask_sync, in_background
from tests.shared.fake_generation import FakeServer

LOST = grpc.StatusCode.UNAVAILABLE
"""Without RetryInfo, as gRPC and proxies say it."""


@pytest.fixture(params=[ask_sync, ask_async])
def ask(request: pytest.FixtureRequest) -> Ask:
    return request.param


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def full(retry_after: float = 0.05) -> ResourceExhausted:
    return ResourceExhausted("queue full", retry_after, reason=Reason.QUEUE_FULL)


def pauses(server: FakeServer) -> list[float]:
    times = server.generation.times
    return [after - before for before, after in itertools.pairwise(times)]


CALLS: dict[str, tuple[Any, ...]] = {
    "generate": ("x",),
    "stream": ("x",),
    "score": ("x",),
    "tokenize": ("x",),
    "detokenize": ([97],),
    "model": (),
    "status": (),
    "abort": ("alive",),
}


@pytest.mark.parametrize("method", CALLS)
def test_every_call_is_tried_again(server: FakeServer, ask: Ask, method: str) -> None:
    expected = ask(server.address, method, *CALLS[method])
    server.generation.failures = [full(), Unavailable("away", 0.05), LOST]
    assert ask(server.address, method, *CALLS[method], client={"retries": 3}) == expected
    assert len(server.generation.times) == 1 + 4


@pytest.mark.parametrize(
    ("retries", "failure"),
    [(retries, failure) for retries in (0, 1, 7) for failure in (full(), Unavailable("away", 0.01))]
    + [(retries, LOST) for retries in (0, 1, 2)],  # its pauses double
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_attempts_are_bounded_by_the_setting(server: FakeServer, method: str, retries: int, failure: Any) -> None:
    """Also beyond five, where gRPC's own retries would be cut, and never multiplied by them."""
    server.generation.failures = [failure] * 40
    with pytest.raises((ResourceExhausted, Unavailable)):
        ask_sync(server.address, method, "x", client={"retries": retries})
    assert len(server.generation.times) == 1 + retries


def test_three_retries_unless_told_otherwise(server: FakeServer) -> None:
    server.generation.failures = [full(0.01)] * 40
    with Client(server.address) as client, pytest.raises(ResourceExhausted):
        client.generate("x")
    assert len(server.generation.times) == 4


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_the_server_says_when(server: FakeServer, ask: Ask, method: str) -> None:
    server.generation.failures = [full(0.3), Unavailable("away", 0.5)]
    ask(server.address, method, "x", client={"retries": 2})
    first, second = pauses(server)
    assert 0.3 <= first < 3.0
    assert 0.5 <= second < 3.0


@pytest.mark.parametrize(
    "failure",
    [
        grokmoe.DeadlineExceeded("late"),
        grokmoe.InternalError("bug"),
        grokmoe.InvalidRequest("sampling.n", "is 0"),
        grokmoe.NotFound("what"),
        grokmoe.FailedPrecondition("another"),
        grokmoe.Cancelled("given up"),
        AlreadyExists("alive"),
        grpc.StatusCode.RESOURCE_EXHAUSTED,  # such as a message above the limit: it will not get smaller
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.UNIMPLEMENTED,
    ],
    ids=lambda failure: getattr(failure, "reason", getattr(failure, "name", "")),
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_nothing_else_is_tried_again(server: FakeServer, ask: Ask, method: str, failure: Any) -> None:
    server.generation.failures = [failure]
    with pytest.raises(grokmoe.GrokmoeError):
        ask(server.address, method, "x", client={"retries": 3})
    assert len(server.generation.times) == 1


def test_nothing_is_tried_again_after_the_first_message(server: FakeServer, ask: Ask) -> None:
    with pytest.raises(Unavailable):
        ask(server.address, "stream", "breaks", client={"retries": 3})
    assert len(server.generation.times) == 1


def test_all_attempts_share_the_deadline(server: FakeServer, ask: Ask) -> None:
    server.generation.failures = [full(0.3)]
    ask(server.address, "generate", "x", client={"retries": 3}, timeout=5.0)
    first, second = server.generation.deadlines
    assert first == pytest.approx(5.0, abs=0.5)
    assert second <= first - 0.25  # gRPC rounds deadlines up


def test_no_pause_beyond_the_deadline(server: FakeServer, ask: Ask) -> None:
    server.generation.failures = [full(30.0)]
    begin = time.monotonic()
    with pytest.raises(ResourceExhausted) as caught:
        ask(server.address, "generate", "x", client={"retries": 3}, timeout=10.0)
    assert time.monotonic() - begin < 5.0
    assert caught.value.retry_after == 30.0


def test_a_lost_attempt_still_has_the_request_id(server: FakeServer, ask: Ask) -> None:
    alive = AlreadyExists("alive")
    server.generation.failures = [LOST, alive]
    assert ask(server.address, "generate", "x", request_id="mine", client={"retries": 3}).request_id == "mine"
    assert [request.request_id for request in server.generation.requests] == ["mine"] * 3
    server.generation.failures = [LOST, alive, alive]
    with pytest.raises(AlreadyExists):
        ask(server.address, "generate", "x", request_id="mine", client={"retries": 2})
    server.generation.failures = [full(), alive]  # refused is not lost: somebody else has the id
    with pytest.raises(AlreadyExists):
        ask(server.address, "generate", "x", request_id="mine", client={"retries": 3})


def test_a_server_that_comes_back(tmp_path: Any) -> None:
    address = f"unix:{tmp_path}/socket"
    with Client(address, retries=20) as client:
        answer = in_background(lambda: client.generate("hello").text)
        with FakeServer(address):
            assert answer.result(timeout=30) == "Hello"


async def until_it_pauses(client: AsyncClient) -> None:
    for _ in range(1000):
        if client._connection is not None and client._connection._pauses:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never paused")


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_closing_ends_a_pause(server: FakeServer, method: str) -> None:
    async def main() -> None:
        client = AsyncClient(server.address)
        call = client.generate("x") if method == "generate" else client.stream("x").completion()
        waiting = asyncio.ensure_future(call)
        await until_it_pauses(client)
        await client.close()
        with pytest.raises(grokmoe.Cancelled):
            await asyncio.wait_for(waiting, 5.0)

    server.generation.failures = [full(100.0)]
    asyncio.run(main())
    assert len(server.generation.times) == 1


def test_leaving_a_stream_ends_its_pause(server: FakeServer) -> None:
    server.generation.failures = [full(100.0)]
    with Client(server.address) as client:
        stream = client.stream("x")
        reading = in_background(lambda: next(stream))
        client._thread.run(until_it_pauses(client._client))
        stream.close()
        with pytest.raises(grokmoe.Cancelled):
            reading.result(timeout=5.0)
        assert list(stream) == []
    assert len(server.generation.times) == 1


def test_a_cancelled_task_ends_its_pause(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await client.generate("x")

    server.generation.failures = [full(100.0)]
    asyncio.run(main())


def test_a_number_of_retries_that_is_none() -> None:
    with pytest.raises(grokmoe.ConfigError, match="retries is -1"):
        AsyncClient("127.0.0.1:1", retries=-1)


@given(retries=st.integers(0, 6), timeout=st.floats(0.0, 20.0), draw=st.floats(0.0, 1.0, exclude_max=True))
def test_pauses_fit_into_the_deadline(retries: int, timeout: float, draw: float) -> None:
    """With a clock that only pauses move: they end before the deadline, double, and are at most as many as allowed."""
    now = 0.0
    attempts = Attempts(retries, timeout, lambda: now, lambda: draw)
    delays = []
    while (delay := attempts.delay_after(Unavailable("away"))) is not None:
        delays.append(delay)
        now += delay
        assert attempts.remaining() == pytest.approx(timeout - now)
    assert len(delays) <= retries
    assert sum(delays) <= timeout
    for number, delay in enumerate(delays):
        assert delay == pytest.approx(min(FIRST_BACKOFF * 2**number, MAX_BACKOFF) * (1 + JITTER * draw))
    if len(delays) < retries:
        assert timeout - now <= MAX_BACKOFF * (1 + JITTER)
