"""What streaming costs: `grokmoe serve` of the embedded model, with its clients in processes of their own.

    python -m benchmarks.streams

Per number of streams: CPU of the server per token, of its event loop, of gRPC's threads and of all others, the
model's; how late its event loop is; how long a token takes from the end of its step to gRPC. Then requests of one token
in and one out per second, and what a thousand streams that nobody reads, or that wait in the queue, cost eight busy
ones. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import statistics
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from grokmoe import AsyncClient
from grokmoe.channel import open_channel
from grokmoe.settings import to_flags
from grokmoe.v1 import generation_pb2 as pb
from launcher.process import RoleProcess

BUSY = 8
BUSY_TOKENS = 500
"""Of a busy stream beside idle ones. Its rate is that from the first fifth to nine tenths of them."""
NUM_CLIENTS = 2
"""Client processes."""
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0),)
"""Of a client that does not read: the server can send 64 KiB ahead and no more."""
GRPC_THREADS = ("grpc", "event_engine", "resolver", "timer")
"""How gRPC names its threads; Python's and torch's have the process's name."""


async def streams(address: str, count: int, tokens: int) -> int:
    """Reads `count` streams of so many tokens at once; the number of messages."""
    async with AsyncClient(address, timeout=600) as client:

        async def read(number: int) -> int:
            stream = client.stream([5 + number % 1000, 7, 9], max_tokens=tokens, ignore_eos=True, temperature=0)
            return sum([1 async for _ in stream])

        return sum(await asyncio.gather(*(read(number) for number in range(count))))


async def tiny(address: str, clients: int, seconds: float) -> int:
    """One token in, one out, again and again: the number of requests answered."""
    end, done = time.perf_counter() + seconds, 0
    async with AsyncClient(address, timeout=600) as client:

        async def loop() -> None:
            nonlocal done
            while time.perf_counter() < end:
                await client.generate([5], max_tokens=1, ignore_eos=True)
                done += 1

        await asyncio.gather(*(loop() for _ in range(clients)))
    return done


async def nothing(address: str) -> None:
    """Comes and goes."""


def in_child(method: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """What a client process does."""

    async def main() -> Any:
        return await method(*args)

    return asyncio.run(main())


class Server:
    """`grokmoe serve` and what can be read off it from outside."""

    def __init__(self, process: RoleProcess, client: AsyncClient, children: ProcessPoolExecutor) -> None:
        self.process, self._client, self._children = process, client, children
        self.address = process.address

    def start(self, method: Callable[..., Awaitable[Any]], *args: Any) -> asyncio.Future[Any]:
        """Runs a function in a client process, with the address as its first argument."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._children, in_child, method, self.address, *args)

    def cpu(self) -> dict[str, float]:
        """Seconds used so far, by whose thread it was."""
        used = dict.fromkeys(("loop", "gRPC", "model"), 0.0)
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # a thread that has just ended
                name, seconds = (task / "comm").read_text(), int((task / "schedstat").read_text().split()[0]) / 1e9
                is_loop = task.name == str(self.process.pid)
                used["loop" if is_loop else "gRPC" if name.startswith(GRPC_THREADS) else "model"] += seconds
        return used

    def metrics(self) -> dict[tuple[str, str], float]:
        """Samples by name and upper edge, if it is a bucket."""
        with urllib.request.urlopen(f"http://{self.process.metrics}/metrics", timeout=30) as page:
            text = page.read().decode()
        families = text_string_to_metric_families(text)
        return {(each.name, each.labels.get("le", "")): each.value for family in families for each in family.samples}

    async def until(self, running: int, waiting: int) -> None:
        """Waits until exactly so many sequences run and wait."""
        async with asyncio.timeout(300):
            while (status := await self._client.status()).running != running or status.waiting != waiting:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def generated(self, tokens: float) -> None:
        """Waits until so many tokens have been generated."""
        async with asyncio.timeout(300):
            while await self.tokens() < tokens:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def tokens(self) -> float:
        """Tokens generated so far."""
        return (await asyncio.to_thread(self.metrics))["grokmoe_generated_tokens_total", ""]


@contextlib.asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Server]:
    """A server, with its clients."""
    from launcher.serve import ServeSettings  # here: it loads torch, which the client processes do without

    process = RoleProcess("serve", 0, "launcher", ["serve", *to_flags(ServeSettings(port=0, **settings))])
    await process.start()
    try:
        await process.wait_ready()
        # Spawned: gRPC does not survive a fork.
        with ProcessPoolExecutor(NUM_CLIENTS + 1, multiprocessing.get_context("spawn")) as children:
            async with AsyncClient(process.address) as client:
                server = Server(process, client, children)
                await asyncio.gather(*(server.start(nothing) for _ in range(NUM_CLIENTS + 1)))
                yield server
    finally:
        await process.stop()


def quantiles(before: dict[tuple[str, str], float], after: dict[tuple[str, str], float], name: str) -> dict[str, float]:
    """p50, p99 and the greatest of a histogram between two readings, in milliseconds: upper edges of buckets."""
    key = f"{name}_bucket"
    edges = sorted((float(edge), count - before[key, edge]) for (each, edge), count in after.items() if each == key)
    total = edges[-1][1]
    wanted = {"p50": 0.5 * total, "p99": 0.99 * total, "max": total}
    return {label: next(edge for edge, count in edges if count >= want) * 1e3 for label, want in wanted.items()}


async def measure_streams(server: Server, count: int, tokens: int) -> dict[str, float]:
    """A row of the table of streams; count 0: the idle server."""
    parts = [part for index in range(NUM_CLIENTS) if (part := (count + index) // NUM_CLIENTS)]
    await asyncio.gather(*(server.start(streams, part, 4) for part in parts))
    before, used, begin = await asyncio.to_thread(server.metrics), server.cpu(), time.perf_counter()
    if not parts:
        await asyncio.sleep(3)
    messages = sum(await asyncio.gather(*(server.start(streams, part, tokens) for part in parts)))
    seconds, now, after = time.perf_counter() - begin, server.cpu(), await asyncio.to_thread(server.metrics)
    row: dict[str, float] = {"streams": count}
    row |= {f"lag {k} ms": v for k, v in quantiles(before, after, "grokmoe_loop_lag_seconds").items()}
    if count:
        row |= {"tokens/s": count * tokens / seconds, "tokens per message": count * tokens / messages}
        row |= {f"{whose} us/token": (now[whose] - used[whose]) / (count * tokens) * 1e6 for whose in now}
        found = quantiles(before, after, "grokmoe_delivery_seconds")
        row |= {f"delivery {k} ms": v for k, v in found.items()}
    return row


@contextlib.asynccontextmanager
async def idle_streams(server: Server, count: int, request: pb.GenerateRequest) -> AsyncIterator[None]:
    """Calls that nobody reads, over as many connections as keep below a connection's limit of streams."""
    data = pb.StreamGenerateRequest(generate=request).SerializeToString()
    channels = [open_channel(server.address, SMALL_WINDOW) for _ in range(1 + count // 100)]
    method = "/grokmoe.v1.Generation/StreamGenerate"
    calls = [channels[number % len(channels)].unary_stream(method)(data) for number in range(count)]
    try:
        yield
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*(channel.close() for channel in channels))


async def busy_rate(server: Server, count: int, kind: str) -> float:
    """Tokens per second of the busy streams, beside `count` idle ones."""
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]))
    request.stopping.ignore_eos, request.stopping.max_tokens = True, 24
    async with contextlib.AsyncExitStack() as stack:
        if kind == "slow" and count:
            request.response.logprobs = 1000  # 24 such messages are twice the window
            begun = await server.tokens()
            await stack.enter_async_context(idle_streams(server, count, request))
            await server.generated(begun + count)  # each has at least its first
            await server.until(0, 0)
        begun = await server.tokens()
        busy = server.start(streams, BUSY, BUSY_TOKENS)
        await server.until(BUSY, 0)
        if kind == "queued" and count:
            await stack.enter_async_context(idle_streams(server, count, request))
            await server.until(BUSY, count)
        await server.generated(begun + BUSY * BUSY_TOKENS * 0.2)
        first, begin = await server.tokens(), time.perf_counter()
        await server.generated(begun + BUSY * BUSY_TOKENS * 0.9)
        last, end = await server.tokens(), time.perf_counter()
        await stack.aclose()
        await busy
    await server.until(0, 0)
    return (last - first) / (end - begin)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    found: dict[str, Any] = {"streams": [], "tiny": {}, "idle": {}}
    async with serving(max_running=max(options.streams), max_waiting=4096) as server:
        await measure_streams(server, BUSY, 16)
        for count in (0, *options.streams):
            found["streams"].append(await measure_streams(server, count, options.tokens))
        for clients in (1, 8, 64):
            found["tiny"][clients] = await server.start(tiny, clients, options.seconds) / options.seconds
    for kind, running in (("queued", BUSY), ("slow", 256)):
        async with serving(max_running=running, max_waiting=4096, kv_gib=0.5) as server:
            await server.start(streams, BUSY, 16)
            rates: dict[int, list[float]] = {0: [], options.idle: []}
            for number in range(options.rounds):
                for count in sorted(rates, reverse=bool(number % 2)):
                    rates[count].append(await busy_rate(server, count, kind))
            ratios = [beside / alone for alone, beside in zip(rates[0], rates[options.idle], strict=True)]
            found["idle"][kind] = {"alone": rates[0], "beside": rates[options.idle], "ratio": statistics.median(ratios)}
    return found


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32, 256], help="at once (default: 1 32 256)")
    parser.add_argument("--tokens", type=int, default=128, help="of each stream (default: 128)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of tiny requests (default: 5)")
    parser.add_argument("--idle", type=int, default=1000, help="idle streams (default: 1000)")
    parser.add_argument("--rounds", type=int, default=4, help="with and without idle streams (default: 4)")
    found = asyncio.run(measure(parser.parse_args()))
    console = Console(width=180)
    rows = found["streams"]
    table = Table(*rows[-1], box=None, padding=(0, 1), title="streams", title_justify="left")
    for row in rows:
        table.add_row(*(f"{row[name]:.4g}" if name in row else "-" for name in rows[-1]))
    console.print(table)
    for clients, rate in found["tiny"].items():
        console.print(f"requests of one token, {clients} at a time: {rate:.0f} a second")
    for kind, each in found["idle"].items():
        console.print(f"{BUSY} streams beside idle ones ({kind}): {each['ratio']:.3f} of their tokens/s alone")
    print(json.dumps({"benchmark": "streams", **found}))


if __name__ == "__main__":
    main()
