"""Calls that may hold anything, beside a neighbour that generates: how they end, and that nothing is left over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import Future
from threading import Thread
from typing import Any

import grpc
from hypothesis import HealthCheck, settings

from tests import goldens
from tests.router.served import Served
from tests.router.tiny import golden_tokens, until

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


async def all_tasks() -> set[Any]:
    return asyncio.all_tasks()


async def settled(num_tasks: int) -> None:
    """Every call's task has ended. Two more may wait for their turn."""
    await until(lambda: len(asyncio.all_tasks()) <= num_tasks + 2)
