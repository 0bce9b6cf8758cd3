"""What ten times too many requests do: the latency of those accepted, and how fast the others are refused.

    python benchmarks/overload.py                      the embedded demo model, fused

Measures the capacity first, by a closed loop; then sends requests at a multiple of it, at random times, without waiting
for answers. The flood comes from a process of its own, and so does a probe: a caller who asks some twenty times a
second, whose latency is not that of a busy client. All share the machine's cores, so the table says how many of them
server and flood have used. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from grokmoe import AsyncClient
from grokmoe.channel import open_channel
from grokmoe.settings import to_flags
from grokmoe.v1 import generation_pb2 as pb
from launcher.paths import DEMO_MODEL
from launcher.process import RoleProcess
from launcher.serve import ServeSettings

PROMPT_TOKENS, NEW_TOKENS = 64, 16
PROBE_PAUSE = (0.02, 0.06)
"""Seconds between two calls of the probe, drawn evenly."""

SETTLE = 1.0
"""Seconds of a flood before its probe begins: until then the queue may still have room."""


@dataclasses.dataclass
class Result:
    """Seconds of each request. `first`, `whole`: of those accepted, to their first and their last token."""

    first: list[float] = dataclasses.field(default_factory=list)
    whole: list[float] = dataclasses.field(default_factory=list)
    refused: list[float] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    cores: float = 0.0
    """Used by the client's process."""


@dataclasses.dataclass
class Row:
    """One multiple of the capacity. server_cores: used by the server meanwhile."""

    multiple: float
    flood: Result
    probe: Result
    server_cores: float


class Caller:
    """One client without the SDK, to take as little as possible from the cores."""

    def __init__(self, address: str, seed: str, vocab_size: int) -> None:
        self.result = Result()
        self.draw = random.Random(seed)
        self._vocab_size = vocab_size
        self._channel: Any = open_channel(address)
        self._generate = self._channel.unary_unary("/grokmoe.v1.Generation/Generate")

    async def ask(self) -> None:
        """One request, whatever becomes of it. Its prompt shares no prefix with any other."""
        ids = [self.draw.randrange(4, self._vocab_size) for _ in range(PROMPT_TOKENS)]
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids))
        request.stopping.max_tokens, request.stopping.ignore_eos = NEW_TOKENS, True
        request.sampling.temperature = 0
        begin = time.perf_counter()
        try:
            answer = pb.GenerateResponse.FromString(await self._generate(request.SerializeToString()))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                self.result.refused.append(time.perf_counter() - begin)
            else:
                self.result.errors.append(error.code().name)
        else:
            self.result.whole.append(time.perf_counter() - begin)
            self.result.first.append(answer.timing.first_token_seconds)

    async def closed_loop(self, running: int, num_requests: int) -> float:
        """Requests per second with as many in flight as may run."""
        left = iter(range(num_requests))

        async def loop() -> None:
            for _ in left:
                await self.ask()

        begin = time.perf_counter()
        await asyncio.gather(*(loop() for _ in range(running)))
        return num_requests / (time.perf_counter() - begin)

    async def flood(self, rate: float, seconds: float) -> Result:
        """Requests at random times, `rate` a second on average."""
        tasks, begin, at, used = [], time.perf_counter(), 0.0, time.process_time()
        while at < seconds:
            await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask()))
            at += self.draw.expovariate(rate)
        self.result.cores = (time.process_time() - used) / (time.perf_counter() - begin)
        await asyncio.gather(*tasks)
        return self.result

    async def probe(self, seconds: float) -> Result:
        """One request after another, with pauses. One that is accepted is given up soon: it is not what is measured."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            await asyncio.sleep(self.draw.uniform(*PROBE_PAUSE))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ask(), 1.0)
        return self.result

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()


def in_process(address: str, seed: str, vocab_size: int, method: str, *args: float) -> Result:
    """What a child process does: one method of a Caller."""

    async def main() -> Result:
        caller = Caller(address, seed, vocab_size)
        result: Result = await getattr(caller, method)(*args)
        await caller.close()
        return result

    return asyncio.run(main())


def cpu_seconds(pid: int) -> float:
    """What a process has used so far, all threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def one_multiple(
    start: Callable[..., asyncio.Future[Result]], pid: int, multiple: float, rate: float, seconds: float
) -> Row:
    """A flood and, after a while, the probe beside it. start: runs a method of a Caller in a child."""
    used, begin = cpu_seconds(pid), time.perf_counter()
    flood = start(f"flood {multiple}", "flood", rate, seconds)
    await asyncio.sleep(SETTLE)
    probe = await start(f"probe {multiple}", "probe", seconds - SETTLE)
    cores = (cpu_seconds(pid) - used) / (time.perf_counter() - begin)
    return Row(multiple, await flood, probe, cores)


async def measure(options: argparse.Namespace) -> tuple[float, list[Row]]:
    """The capacity, and a row per multiple of it."""
    settings = ServeSettings(model=str(DEMO_MODEL), port=0, max_running=options.running, max_waiting=options.waiting)
    process = RoleProcess("serve", 0, "launcher", ["serve", *to_flags(settings)])
    loop = asyncio.get_running_loop()
    await process.start()
    try:
        await process.wait_ready()
        async with AsyncClient(process.address) as client:
            vocab_size = (await client.model()).vocab_size
        caller = Caller(process.address, f"{options.seed}", vocab_size)
        await caller.closed_loop(options.running, options.running * 2)
        best = await caller.closed_loop(options.running, options.running * 12)
        await caller.close()
        # Spawned: gRPC does not survive a fork.
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as children:

            def start(seed: str, method: str, *args: float) -> asyncio.Future[Result]:
                seed = f"{options.seed} {seed}"
                return loop.run_in_executor(children, in_process, process.address, seed, vocab_size, method, *args)

            await asyncio.gather(*(start("warm", "probe", 0.5) for _ in range(2)))  # both have imported all by then
            rows = [
                await one_multiple(start, process.pid, multiple, best * multiple, options.seconds)
                for multiple in options.multiples
            ]
        return best, rows
    finally:
        await process.stop()


def milliseconds(values: list[float], share: float) -> float | None:
    """A quantile; None of nothing."""
    if not values:
        return None
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))] * 1e3, 1)


def summary(row: Row) -> dict[str, Any]:
    """A row of the table by column."""
    flood, probe = row.flood, row.probe
    found: dict[str, Any] = {"rate": f"{row.multiple:g}x", "accepted": len(flood.whole), "refused": len(flood.refused)}
    found["errors"] = len(flood.errors) + len(probe.errors)
    for name, values in (("TTFT", flood.first), ("whole", flood.whole), ("refusal", flood.refused)):
        found |= {f"{name} p50": milliseconds(values, 0.5), f"{name} p99": milliseconds(values, 0.99)}
    found["probes refused"] = len(probe.refused)
    found |= {"probe p50": milliseconds(probe.refused, 0.5), "probe p99": milliseconds(probe.refused, 0.99)}
    return found | {"server cores": round(row.server_cores, 2), "flood cores": round(flood.cores, 2)}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--multiples", type=float, nargs="+", default=[0.5, 1.0, 2.0, 10.0], help="of the capacity")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each flood (default: 10)")
    parser.add_argument("--running", type=int, default=16, help="sequences that run at once (default: 16)")
    parser.add_argument("--waiting", type=int, default=32, help="sequences that may wait (default: 32)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    best, rows = asyncio.run(measure(options))
    console = Console(width=160)
    console.print(f"capacity {best:.1f} requests/s ({PROMPT_TOKENS} tokens in, {NEW_TOKENS} out); milliseconds")
    found = [summary(row) for row in rows]
    table = Table(*found[0], box=None, padding=(0, 1))
    for each in found:
        table.add_row(*("-" if value is None else str(value) for value in each.values()))
    console.print(table)
    print(json.dumps({"benchmark": "overload", "capacity": best, "rows": found}))


if __name__ == "__main__":
    main()
