"""Every RPC of the router with anything at all, beside a neighbour that generates: right code, nothing left over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from threading import Thread
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grokmoe.v1 import control_pb2, generation_pb2
from tests import goldens
from tests.fuzz.messages import wire
from tests.router.served import Served, service
from tests.router.tiny import golden_tokens, until

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["Generation"],
    control_pb2.DESCRIPTOR.services_by_name["Control"],
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
)
METHODS = {
    f"/{each.full_name}/{method.name}": (method.input_type, method.server_streaming)
    for each in SERVICES
    for method in each.methods
    if method.name != "List"  # of health; nobody serves it yet
}
EXPECTED = {
    "OK",
    "INVALID_ARGUMENT",
    "FAILED_PRECONDITION",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
}
"""What bad input and good input may end with. Never INTERNAL or UNKNOWN: those are bugs of ours."""

FUZZ = settings(max_examples=10, suppress_health_check=list(HealthCheck), deadline=None)
DEADLINE = 0.25
"""Of a call: a request that happens to be valid may ask for a long text, and Watch never ends."""

CALL_TIMEOUT = 30.0


class Loop:
    """A service on an event loop of its own, so that one server can serve many examples."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result(CALL_TIMEOUT)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Served, Callable[[Any], Any]]]:
    loop, stack = Loop(), contextlib.AsyncExitStack()
    try:
        yield loop.run(stack.enter_async_context(service())), loop.run
        loop.run(stack.aclose())
    finally:
        loop.close()


async def feed(parts: list[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def code_of(channel: Any, method: str, parts: list[bytes]) -> str:
    """How a call ends that sends these messages, whatever the method expects."""
    call = channel.stream_stream(method)(feed(parts), timeout=DEADLINE)
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass
    return await ending_of(call) or "CANCELLED"


async def ending_of(call: Any) -> str | None:
    """The code's name; None if the client's own library only noticed that it wrote to a call that had ended."""
    code = await call.code()
    return None if await call.details() == "Internal error from Core" else str(code.name)


async def neighbour(served: Served) -> None:
    answer = await served.client.generate(
        goldens.PROMPTS["len1"], max_tokens=16, temperature=0, text=False, ignore_eos=True
    )
    assert answer.token_ids == tuple(golden_tokens("len1"))


async def nothing_is_left(served: Served) -> None:
    engine = served.engine
    await until(lambda: not engine.num_running and not engine.num_waiting)
    await until(lambda: not any(cell.scheduler.ledger.num_used for cell in engine.cells))
    engine.check()


async def beside_a_neighbour(served: Served, method: str, parts: list[bytes]) -> str:
    code, _ = await asyncio.gather(code_of(served.channel, method, parts), neighbour(served))
    await nothing_is_left(served)
    return str(code)


@pytest.mark.parametrize("method", METHODS)
def test_one_message(served: Any, method: str) -> None:
    serving, run = served
    num_tasks = len(run(all_tasks()))

    @FUZZ
    @given(wire(METHODS[method][0]))
    def check(data: bytes) -> None:
        assert run(beside_a_neighbour(serving, method, [data])) in EXPECTED

    check()
    run(settled(num_tasks))


async def all_tasks() -> set[Any]:
    return asyncio.all_tasks()


async def settled(num_tasks: int) -> None:
    """Every call's task has ended. Two more may wait for their turn."""
    await until(lambda: len(asyncio.all_tasks()) <= num_tasks + 2)


@pytest.mark.parametrize("method", METHODS)
def test_no_message_or_several(served: Any, method: str) -> None:
    serving, run = served

    @settings(FUZZ, max_examples=3)
    @given(st.lists(wire(METHODS[method][0]), max_size=3).filter(lambda parts: len(parts) != 1))
    def check(parts: list[bytes]) -> None:
        code = run(beside_a_neighbour(serving, method, parts))
        # gRPC's library answers a unary call with no message or several by itself.
        assert code in EXPECTED | {"UNIMPLEMENTED", "CANCELLED"}

    check()
