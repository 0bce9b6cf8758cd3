"""What clients notice of experts that move: the time between two tokens, undisturbed and while experts move.

    python -m benchmarks.moves                         the embedded demo model, three expert workers

Spans under the same load: undisturbed; every expert in turn to the next worker, several a second; and a skewed
placement, before, during and after a rebalance. Each stream's tokens are held against those it had at first. A stall is
the time between two tokens of one stream. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import AsyncIterator

from rich.console import Console
from rich.table import Table

from grokmoe import AsyncClient, Status, WorkerRole
from grokmoe.errors import GrokmoeError
from launcher.paths import DEMO_MODEL
from launcher.up import Cluster, UpSettings

PROMPT_TOKENS, NEW_TOKENS = 24, 64
PAUSE = 0.4
"""Seconds between two moves: an expert comes back to a worker only after that has forgotten it, and is loaded again."""

MEASURED = 1.0
"""Imbalance that has been measured: below it stands for too few rows."""


@dataclasses.dataclass
class Span:
    """What streams saw of one span. Seconds. stalls: between two tokens of one stream; changed: streams whose tokens
    were others than those of the first span.
    """

    seconds: float = 0.0
    num_tokens: int = 0
    stalls: list[float] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    changed: int = 0

    def figures(self) -> dict[str, float]:
        """For a row of the table."""
        stalls = sorted(self.stalls)
        return {
            "tokens_per_second": self.num_tokens / self.seconds,
            "stall_median_ms": statistics.median(stalls) * 1e3,
            "stall_p99_ms": stalls[int(0.99 * (len(stalls) - 1))] * 1e3,
            "stall_max_ms": stalls[-1] * 1e3,
            "failed": len(self.failed),
            "changed": self.changed,
        }


class Streams:
    """Clients that stream without a pause, each the same prompt again and again."""

    def __init__(self, client: AsyncClient, count: int) -> None:
        self._client, self._count = client, count
        self._expected: dict[int, tuple[int, ...]] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Span]:
        """A span, from entering to leaving; streams that are under way then are read to their end and not counted."""
        span, begin = Span(), time.perf_counter()
        over = asyncio.Event()
        tasks = [asyncio.create_task(self._run(number, span, over)) for number in range(self._count)]
        try:
            yield span
        finally:
            span.seconds = time.perf_counter() - begin
            over.set()
            await asyncio.gather(*tasks)

    async def _run(self, number: int, span: Span, over: asyncio.Event) -> None:
        prompt = [4 + (number * 37 + place * 11) % 500 for place in range(PROMPT_TOKENS)]
        while not over.is_set():
            tokens: list[int] = []
            last: float | None = None
            try:
                options = {"max_tokens": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True}
                async for delta in self._client.stream(prompt, **options):  # type: ignore[arg-type]
                    now = time.perf_counter()
                    tokens += delta.token_ids
                    if over.is_set():
                        continue
                    span.num_tokens += len(delta.token_ids)
                    if last is not None:
                        span.stalls.append(now - last)
                    last = now
            except GrokmoeError as error:
                span.failed.append(f"{type(error).__name__}: {error.message}")
                continue
            expected = self._expected.setdefault(number, tuple(tokens))
            span.changed += expected != tuple(tokens)


def _workers(status: Status) -> list[str]:
    """Addresses of the expert workers, by index."""
    return [worker.address for worker in status.workers if worker.role is WorkerRole.EXPERT]


async def move_all_the_time(client: AsyncClient, seconds: float) -> dict[str, float]:
    """Every expert in turn to the next worker, a PAUSE between two moves. Returns what moves cost, in the median."""
    costs, end, expert = [], time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        status = await client.status()
        workers, placed = _workers(status), status.placement[expert].workers
        target = (placed[0] + 1) % len(workers)
        costs.append(await client.move_experts(expert, source=workers[placed[0]], target=workers[target]))
        expert = (expert + 1) % len(status.placement)
        await asyncio.sleep(PAUSE)
    return {
        "moves": len(costs),
        "loaded_mb": statistics.median(cost.loaded_bytes for cost in costs) / 1e6,
        "load_seconds": statistics.median(cost.load_seconds for cost in costs),
        "drain_ms": statistics.median(cost.drain_seconds for cost in costs) * 1e3,
        "drain_max_ms": max(cost.drain_seconds for cost in costs) * 1e3,
    }


async def skew(client: AsyncClient) -> None:
    """All experts but two to the first worker."""
    status = await client.status()
    workers = _workers(status)
    for placed in status.placement[: len(status.placement) - 2]:
        if placed.workers[0] != 0:
            await client.move_experts(placed.expert, source=workers[placed.workers[0]], target=workers[0])
    last = (await client.status()).placement[-2:]
    for index, placed in enumerate(last):
        at, wanted = placed.workers[0], 1 + index % (len(workers) - 1)
        if at != wanted:
            await client.move_experts(placed.expert, source=workers[at], target=workers[wanted])


async def measured_imbalance(client: AsyncClient) -> float:
    """Of the placement as it is; waits until enough rows have been seen since it became so."""
    while (imbalance := (await client.status()).imbalance) < MEASURED:  # noqa: ASYNC110
        await asyncio.sleep(0.5)
    return imbalance


async def measure(settings: UpSettings, num_streams: int, seconds: float) -> dict[str, dict[str, float]]:
    """Starts a cluster, measures, ends it."""
    rows: dict[str, dict[str, float]] = {}
    async with Cluster(settings) as cluster, AsyncClient(cluster.address, retries=0) as client:
        streams = Streams(client, num_streams)
        async with streams.running():
            await asyncio.sleep(2.0)  # warm
        async with streams.running() as still:
            await asyncio.sleep(seconds)
        rows["undisturbed"] = still.figures()
        async with streams.running() as moving:
            cost = await move_all_the_time(client, seconds)
        rows["moving"] = {**moving.figures(), **cost}
        await skew(client)
        async with streams.running() as skewed:
            await asyncio.sleep(seconds)
            before = await measured_imbalance(client)
        rows["skewed"] = {**skewed.figures(), "imbalance": before}
        async with streams.running() as rebalancing:
            begin = time.perf_counter()
            found = await client.rebalance_experts(force=True)
            took = time.perf_counter() - begin
            await asyncio.sleep(1.0)
        assert found.done, found
        rows["rebalance"] = {
            **rebalancing.figures(),
            "moves": len(found.moves),
            "took_seconds": took,
            "forecast_imbalance": found.forecast_imbalance,
            "gain_seconds": found.gain_seconds,
            "cost_seconds": found.cost_seconds,
        }
        async with streams.running() as even:
            await asyncio.sleep(seconds)
            after = await measured_imbalance(client)
        rows["rebalanced"] = {**even.figures(), "imbalance": after}
    return rows


def show(rows: dict[str, dict[str, float]]) -> None:
    """The table and, as the last line, the same as JSON."""
    table = Table(box=None)
    for column in ("span", "tokens/s", "stall median ms", "p99", "max", "failed", "changed", "imbalance"):
        table.add_column(column, justify="left" if column == "span" else "right")
    for span, row in rows.items():
        table.add_row(
            span,
            f"{row['tokens_per_second']:.0f}",
            f"{row['stall_median_ms']:.1f}",
            f"{row['stall_p99_ms']:.1f}",
            f"{row['stall_max_ms']:.1f}",
            f"{row['failed']:.0f}",
            f"{row['changed']:.0f}",
            f"{row['imbalance']:.2f}" if "imbalance" in row else "",
        )
    console = Console(highlight=False)
    console.print(table)
    moving, plan = rows["moving"], rows["rebalance"]
    console.print(
        f"moving: {moving['moves']:.0f} moves of {moving['loaded_mb']:.1f} MB, {moving['load_seconds']:.2f} s each, "
        f"old holder done after {moving['drain_ms']:.1f} ms (longest {moving['drain_max_ms']:.1f})"
    )
    console.print(
        f"rebalance: {plan['moves']:.0f} moves in {plan['took_seconds']:.1f} s, forecast "
        f"{plan['forecast_imbalance']:.2f}, gain {plan['gain_seconds']:.1f} s, cost {plan['cost_seconds']:.1f} s"
    )
    print(json.dumps(rows))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="checkpoint directory")
    parser.add_argument("--experts", type=int, default=3, help="expert workers, at least two")
    parser.add_argument("--streams", type=int, default=4, help="clients that stream at the same time")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a span")
    arguments = parser.parse_args()
    settings = UpSettings(
        model=arguments.model, experts=arguments.experts, dtype="float32", port=0, kv_gib=0.05, log_level="warning"
    )
    show(asyncio.run(measure(settings, arguments.streams, arguments.seconds)))


if __name__ == "__main__":
    main()
