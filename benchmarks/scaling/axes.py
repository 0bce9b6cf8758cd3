"""What is varied, and what is measured at each value. Every axis starts services of its own and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from benchmarks.scaling.memory import peak_bytes, resident_bytes
from benchmarks.scaling.models import Models, stored_bytes
from benchmarks.step.loads import Load, run
from benchmarks.step.topologies import Service, start
from grokmoe import AsyncClient

PROMPT, NEW = 32, 48
"""Tokens of a decode: the prompt short, so that what is varied is all that grows."""


BUSY, LONG = 8, 8000
"""Streams that get tokens while others wait, and how many they may get: more than come while anything is measured."""

SPAN = 1.0
"""Seconds over which steps under way are counted."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """What grows with what. points: (x, y), x ascending. unit: of y."""

    name: str
    x: str
    unit: str
    points: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is common to all axes. rounds: runs of each point, after one that does not count."""

    models: Models
    dtype: str
    rounds: int


Axis = Callable[[Sizes, Sequence[int]], Awaitable[list[Curve]]]


async def batch(sizes: Sizes, values: Sequence[int]) -> list[Curve]:
    """Sequences that decode at once, fused."""
    async with _service(sizes) as service:
        points = [(x, await _step_ms(service.client, sizes, Load(f"decode {x}", x, PROMPT, _new(x)))) for x in values]
    return [Curve("decode step, fused", "sequences", "ms", tuple(points))]


async def prompt(sizes: Sizes, values: Sequence[int]) -> list[Curve]:
    """Tokens of one prompt, fused; the part that grows with its square is the attention."""
    async with _service(sizes) as service:
        points = [(x, await _step_ms(service.client, sizes, Load(f"prefill {x}", 1, x, 1))) for x in values]
    return [
        Curve("prefill, fused", "tokens", "ms", tuple(points)),
        Curve("prefill per token, fused", "tokens", "us", tuple((x, ms * 1e3 / x) for x, ms in points)),
    ]


async def experts(sizes: Sizes, values: Sequence[int]) -> list[Curve]:
    """Expert worker processes: time of a step with 8 sequences, and what the processes hold."""
    steps, workers, totals = [], [], []
    for x in values:
        async with _service(sizes, num_workers=x) as service:
            steps.append((x, await _step_ms(service.client, sizes, Load("decode 8", 8, PROMPT, NEW))))
            held = {name: resident_bytes(pid) / 2**20 for name, pid in service.processes.items()}
            workers.append((x, statistics.mean(mib for name, mib in held.items() if name.startswith("expert"))))
            totals.append((x, sum(held.values())))
    return [
        Curve("decode step, 8 sequences, split", "expert workers", "ms", tuple(steps)),
        Curve("memory of one expert worker", "expert workers", "MiB", tuple(workers)),
        Curve("memory of all processes", "expert workers", "MiB", tuple(totals)),
    ]


async def layers(sizes: Sizes, values: Sequence[int]) -> list[Curve]:
    """Layers of the model, all else equal: time of a step, start-up, and memory against the checkpoint's size."""
    steps, ready, peaks, resident = [], [], [], []
    for x in values:
        directory = sizes.models.with_layers(x)
        stored = stored_bytes(directory) / 2**20
        begin = time.perf_counter()
        async with start(directory, sizes.dtype, 0) as service:
            ready.append((stored, time.perf_counter() - begin))
            (pid,) = service.processes.values()
            peaks.append((stored, peak_bytes(pid) / 2**20))
            resident.append((stored, resident_bytes(pid) / 2**20))
            steps.append((x, await _step_ms(service.client, sizes, Load("decode 8", 8, PROMPT, NEW))))
    return [
        Curve("decode step, 8 sequences, fused", "layers", "ms", tuple(steps)),
        Curve("start to READY, fused", "MiB of checkpoint", "s", tuple(ready)),
        Curve("peak memory at READY, fused", "MiB of checkpoint", "MiB", tuple(peaks)),
        Curve("memory at READY, fused", "MiB of checkpoint", "MiB", tuple(resident)),
    ]


async def streams(sizes: Sizes, values: Sequence[int]) -> list[Curve]:
    """Streams that are open, all but BUSY of them waiting: time of a step of the busy ones, memory of the process."""
    steps, memory = [], []
    async with _service(sizes, max_running=BUSY, max_waiting=max(values)) as service:
        (pid,) = service.processes.values()
        for x in values:
            async with _open_streams(service.client, BUSY, x - BUSY):
                steps.append((x, await _step_ms_under_way(service.client, sizes.rounds)))
                memory.append((x, resident_bytes(pid) / 2**20))
    return [
        Curve(f"decode step of {BUSY} busy ones, fused", "open streams", "ms", tuple(steps)),
        Curve("memory of the process, fused", "open streams", "MiB", tuple(memory)),
    ]


async def sequences(sizes: Sizes, values: Sequence[int]) -> list[Curve]:
    """Sequences that hold pages at once: KV pages in use, and the memory of router and attention worker, split."""
    pages, router, attention = [], [], []
    async with _service(sizes, num_workers=1) as service:
        for x in values:
            hold = asyncio.create_task(run(service.client, Load(f"hold {x}", x, 256, _new(x)), _vocabulary(sizes), 0))
            used = 0
            while not hold.done():
                status = await service.client.status()
                used = max([used, *(worker.used_pages for worker in status.workers)])
                await asyncio.sleep(0.02)
            await hold
            pages.append((x, used))
            router.append((x, peak_bytes(service.processes["router 0"]) / 2**20))
            attention.append((x, peak_bytes(service.processes["attention 0"]) / 2**20))
    return [
        Curve("KV pages in use", "sequences", "pages", tuple(pages)),
        Curve("peak memory of the router", "sequences", "MiB", tuple(router)),
        Curve("peak memory of the attention worker", "sequences", "MiB", tuple(attention)),
    ]


AXES: dict[str, tuple[Axis, tuple[int, ...]]] = {
    "batch": (batch, (1, 2, 4, 8, 16, 32, 64, 128)),
    "prompt": (prompt, (128, 256, 512, 1024, 2048, 4096, 8000)),
    "experts": (experts, (1, 2, 4, 8)),
    "layers": (layers, (1, 2, 4, 8, 16)),
    "streams": (streams, (8, 50, 100, 300, 1000)),
    "sequences": (sequences, (1, 8, 32, 128)),
}
"""Name -> what measures it, and its values. The longest prompt leaves room for a token in a context of 8192."""


def _service(
    sizes: Sizes, num_workers: int = 0, **limits: int
) -> contextlib.AbstractAsyncContextManager[Service, bool | None]:
    return start(sizes.models.directory, sizes.dtype, num_workers, **limits)


def _vocabulary(sizes: Sizes) -> int:
    return sizes.models.config.vocab_size


def _new(batch: int) -> int:
    """Tokens of a decode: some more for many sequences, whose prompts take several steps."""
    return NEW + batch // 2


async def _step_ms(client: AsyncClient, sizes: Sizes, load: Load) -> float:
    runs = [await run(client, load, _vocabulary(sizes), seed) for seed in range(-1, sizes.rounds)]
    return statistics.median(measured.seconds for measured in runs[1:]) * 1e3


@contextlib.asynccontextmanager
async def _open_streams(client: AsyncClient, busy: int, idle: int) -> AsyncIterator[None]:
    """So many streams that get tokens all the time, and requests that wait behind them, until the block is left."""
    options = {"temperature": 0.0, "ignore_eos": True}
    running = [client.stream([4 + n], max_tokens=LONG, **options) for n in range(busy)]  # type: ignore[arg-type]
    for stream in running:
        await anext(stream)
    readers = [asyncio.create_task(stream.completion()) for stream in running]
    waiting = [client.stream([4 + n % 1000], max_tokens=1, **options) for n in range(idle)]  # type: ignore[arg-type]
    while (await client.status()).waiting < idle:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    try:
        yield
    finally:
        for reader in readers:
            reader.cancel()
        for stream in [*waiting, *running]:
            await stream.aclose()
        await asyncio.gather(*readers, return_exceptions=True)
        while (status := await client.status()).waiting + status.running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def _step_ms_under_way(client: AsyncClient, rounds: int) -> float:
    """Of the steps that are under way, as the router counts them."""
    times = []
    for _ in range(rounds):
        before, begin = await client.status(), time.perf_counter()
        await asyncio.sleep(SPAN)
        after = await client.status()
        times.append((time.perf_counter() - begin) / (after.steps - before.steps))
    return statistics.median(times) * 1e3
