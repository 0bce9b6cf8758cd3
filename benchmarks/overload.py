"""What ten times too many requests do: the latency of those accepted, and how fast the others are refused.

    python benchmarks/overload.py                      the embedded demo model, fused

Measures the capacity first, by a closed loop; then sends requests at a multiple of it, at random times, without waiting
for answers. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import statistics
import time

from rich.console import Console
from rich.table import Table

from grokmoe import AsyncClient, ResourceExhausted
from grokmoe.settings import to_flags
from launcher.paths import DEMO_MODEL
from launcher.process import RoleProcess
from launcher.serve import ServeSettings

PROMPT_TOKENS, NEW_TOKENS = 64, 16


@dataclasses.dataclass
class Result:
    """Seconds of each request. `first`, `whole`: of those accepted, to their first and their last token."""

    rate: float
    first: list[float] = dataclasses.field(default_factory=list)
    whole: list[float] = dataclasses.field(default_factory=list)
    refused: list[float] = dataclasses.field(default_factory=list)
    hints: list[float] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)


async def ask(client: AsyncClient, prompt: list[int], result: Result) -> None:
    """One request, whatever becomes of it."""
    begin = time.perf_counter()
    try:
        done = await client.generate(prompt, max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    except ResourceExhausted as error:
        result.refused.append(time.perf_counter() - begin)
        result.hints.append(error.retry_after)
    except Exception as error:
        result.errors.append(f"{type(error).__name__}: {error}")
    else:
        result.whole.append(time.perf_counter() - begin)
        result.first.append(done.timing.first_token_seconds)


async def capacity(client: AsyncClient, prompts: list[list[int]], running: int) -> float:
    """Requests per second with as many in flight as may run."""
    result, queue = Result(0.0), iter(prompts)

    async def loop() -> None:
        for prompt in queue:
            await ask(client, prompt, result)

    begin = time.perf_counter()
    await asyncio.gather(*(loop() for _ in range(running)))
    return len(result.whole) / (time.perf_counter() - begin)


async def flood(client: AsyncClient, rate: float, seconds: float, draw: random.Random, vocab_size: int) -> Result:
    """Requests at random times, `rate` a second on average."""
    result, tasks, begin, at = Result(rate), [], time.perf_counter(), 0.0
    while at < seconds:
        await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(client, random_prompt(draw, vocab_size), result)))
        at += draw.expovariate(rate)
    await asyncio.gather(*tasks)
    return result


def random_prompt(draw: random.Random, vocab_size: int) -> list[int]:
    """Shares no prefix with any other."""
    return [draw.randrange(4, vocab_size) for _ in range(PROMPT_TOKENS)]


async def measure(options: argparse.Namespace) -> tuple[float, list[Result]]:
    """The capacity, and a result per multiple of it."""
    draw = random.Random(options.seed)
    settings = ServeSettings(model=str(DEMO_MODEL), port=0, max_running=options.running, max_waiting=options.waiting)
    process = RoleProcess("serve", 0, "launcher", ["serve", *to_flags(settings)])
    await process.start()
    try:
        await process.wait_ready()
        async with AsyncClient(process.address, retries=0) as client:
            vocab_size = (await client.model()).vocab_size
            prompts = [random_prompt(draw, vocab_size) for _ in range(options.running * 12)]
            await capacity(
                client, [random_prompt(draw, vocab_size) for _ in range(options.running * 2)], options.running
            )
            best = await capacity(client, prompts, options.running)
            results = [
                await flood(client, best * multiple, options.seconds, draw, vocab_size)
                for multiple in options.multiples
            ]
            return best, results
    finally:
        await process.stop()


def percentile(values: list[float], share: float) -> str:
    """Milliseconds, or a dash."""
    if not values:
        return "-"
    return f"{sorted(values)[min(len(values) - 1, int(share * len(values)))] * 1e3:.1f}"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--multiples", type=float, nargs="+", default=[0.5, 1.0, 2.0, 10.0], help="of the capacity")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each flood (default: 10)")
    parser.add_argument("--running", type=int, default=16, help="sequences that run at once (default: 16)")
    parser.add_argument("--waiting", type=int, default=32, help="sequences that may wait (default: 32)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    best, results = asyncio.run(measure(options))
    console = Console(width=120)
    console.print(f"capacity {best:.1f} requests/s ({PROMPT_TOKENS} tokens in, {NEW_TOKENS} out)")
    table = Table("rate", box=None, padding=(0, 2))
    for column in ("accepted", "refused", "errors", "TTFT p50 ms", "p99", "whole p50", "p99", "refusal p50", "p99"):
        table.add_column(column, justify="right")
    for multiple, result in zip(options.multiples, results, strict=True):
        table.add_row(
            f"{multiple:g}x",
            *(str(len(values)) for values in (result.whole, result.refused, result.errors)),
            *(
                percentile(values, share)
                for values in (result.first, result.whole, result.refused)
                for share in (0.5, 0.99)
            ),
        )
    console.print(table)
    summary = {
        "capacity": best,
        "floods": [
            {
                "multiple": multiple,
                "accepted": len(result.whole),
                "refused": len(result.refused),
                "errors": result.errors[:5],
                "refusal_median": statistics.median(result.refused) if result.refused else None,
            }
            for multiple, result in zip(options.multiples, results, strict=True)
        ],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
