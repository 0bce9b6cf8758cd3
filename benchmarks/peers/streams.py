"""Loads of streaming clients, whatever server they stream from, and the metrics of what they saw."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from benchmarks.peers.child import PeerFailed
from benchmarks.peers.workload import Workload, decode, first_token, gap, gap_beside, prefill, served

Ask = Callable[[Sequence[int], int], AsyncIterator[int]]
"""(prompt, new) -> how many tokens each piece of the answer has, as pieces come; `new` together."""

T = TypeVar("T")

FIRST_ID = 300
"""Prompts have no smaller ids: they may be bytes and control symbols."""


@dataclasses.dataclass(frozen=True)
class Heard:
    """One stream. begin, arrivals (of the pieces): monotonic seconds."""

    begin: float
    arrivals: tuple[float, ...]
    num_tokens: int


class Prompts:
    """Random ids, so that no prompt shares a prefix with another and no cache has it."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._ids = range(min(FIRST_ID, vocab_size // 2), vocab_size)
        self._draw = random.Random(seed)

    def next(self, length: int) -> list[int]:
        """One of this length."""
        return self._draw.choices(self._ids, k=length)


async def listen(ask: Ask, prompt: Sequence[int], new: int) -> Heard:
    """One stream to its end. Raises PeerFailed if it has fewer tokens."""
    begin, arrivals, num_tokens = time.perf_counter(), [], 0
    async for count in ask(prompt, new):
        arrivals.append(time.perf_counter())
        num_tokens += count
    if num_tokens != new:
        raise PeerFailed(f"a stream of {new} tokens had {num_tokens}")
    return Heard(begin, tuple(arrivals), num_tokens)


async def all_of(running: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results. The first one that fails ends the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in running]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def together(ask: Ask, prompts: Sequence[Sequence[int]], new: int) -> float:
    """Seconds until the last of these streams has ended."""
    begin = time.perf_counter()
    await all_of(listen(ask, prompt, new) for prompt in prompts)
    return time.perf_counter() - begin


async def loads(ask: Ask, prompts: Prompts, workload: Workload) -> dict[str, float]:
    """Prefill and decode: metric -> tokens/s. Each load is done once before it counts.

    A decode is left out if more tokens took less time: others had the cores, and the difference says nothing.
    """
    found = {}
    for length in workload.prefills:
        seconds = [await together(ask, [prompts.next(length)], 1) for _ in range(workload.repeats + 1)]
        found[prefill(length).name] = length / statistics.median(seconds[1:])
    for batch in workload.batches:
        rates = []
        for _ in range(workload.repeats + 1):
            first = await together(ask, [prompts.next(workload.prompt) for _ in range(batch)], 1)
            whole = await together(ask, [prompts.next(workload.prompt) for _ in range(batch)], workload.new + 1)
            if whole > first:
                rates.append(batch * workload.new / (whole - first))
        if rates[1:]:
            found[decode(batch).name] = statistics.median(rates[1:])
    return found


async def closed_loop(ask: Ask, prompts: Prompts, workload: Workload, clients: int) -> tuple[float, list[Heard]]:
    """Clients that each stream one answer after another. Seconds of all, and what was heard."""

    async def client() -> list[Heard]:
        return [await listen(ask, prompts.next(workload.prompt), workload.new) for _ in range(workload.requests)]

    begin = time.perf_counter()
    heard = await all_of(client() for _ in range(clients))
    return time.perf_counter() - begin, list(itertools.chain.from_iterable(heard))


async def serving(ask: Ask, prompts: Prompts, workload: Workload) -> dict[str, float]:
    """The closed loops: metric -> tokens/s or ms."""
    found = {}
    for clients in workload.clients:
        seconds, heard = await closed_loop(ask, prompts, workload, clients)
        found[served(clients).name] = sum(each.num_tokens for each in heard) / seconds
        found[first_token(clients).name] = 1e3 * statistics.median(each.arrivals[0] - each.begin for each in heard)
        found[gap(clients).name] = 1e3 * percentile(gaps(heard), 0.99)
    return found


async def serving_beside(ask: Ask, prompts: Prompts, workload: Workload) -> dict[str, float]:
    """The largest closed loop while long prompts arrive, one every `long_every` seconds."""
    clients = max(workload.clients)
    disturbing = asyncio.create_task(_disturb(ask, prompts, workload))
    try:
        _, heard = await closed_loop(ask, prompts, workload, clients)
    finally:
        disturbing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await disturbing
    return {gap_beside(clients, workload.long_prompt).name: 1e3 * percentile(gaps(heard), 0.99)}


async def _disturb(ask: Ask, prompts: Prompts, workload: Workload) -> None:
    """Until it is cancelled. The clock goes on while prompts are computed: they may pile up."""
    try:
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(listen(ask, prompts.next(workload.long_prompt), 1))
                await asyncio.sleep(workload.long_every)
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


def gaps(heard: Sequence[Heard]) -> list[float]:
    """Seconds between two pieces of a stream, of all streams."""
    return [later - sooner for each in heard for sooner, later in itertools.pairwise(each.arrivals)]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values do not exceed."""
    return sorted(values)[max(1, math.ceil(share * len(values))) - 1] if values else 0.0
