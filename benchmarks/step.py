"""Where the time of a step goes, leg by leg, fused and split: prefill and decode at several batch sizes.

    python benchmarks/step.py                          the embedded demo model
    python benchmarks/step.py --preset bench           0.89 B parameters, random; made once, kept in --cache

Every topology is measured through the service, by the SDK; the legs are what the router reports (docs/architecture.md).
The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grokmoe import AsyncClient, Status
from grokmoe.settings import to_flags
from launcher.paths import DEMO_MODEL
from launcher.process import RoleProcess
from launcher.serve import ServeSettings
from launcher.up import Cluster, UpSettings


@dataclasses.dataclass(frozen=True)
class Load:
    """One kind of work: `batch` sequences at once, `prompt` tokens in, `new` tokens out."""

    name: str
    batch: int
    prompt: int
    new: int


LOADS = (
    Load("prefill 512", 1, 512, 1),
    Load("decode 1", 1, 32, 48),
    Load("decode 8", 8, 32, 48),
    Load("decode 32", 32, 32, 48),
)


@dataclasses.dataclass
class Result:
    """One entry per run. legs and step: milliseconds per step."""

    tokens_per_second: list[float] = dataclasses.field(default_factory=list)
    legs: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    step: list[float] = dataclasses.field(default_factory=list)


def bench_model(cache: Path) -> Path:
    """The directory of the random bench model, made if it is not there."""
    import torch

    from grokmoe.checkpoint_writer import random_checkpoint
    from grokmoe.model_config import ModelConfig

    directory = cache / "bench"
    if not (directory / "config.json").exists():
        config = ModelConfig(
            vocab_size=32000,
            hidden_size=1024,
            intermediate_size=4096,
            num_layers=8,
            num_heads=8,
            num_kv_heads=2,
            head_dim=128,
            num_experts=8,
            experts_per_token=2,
            context_length=8192,
            tie_word_embeddings=False,
            embedding_multiplier=78.38367176906169,
            output_multiplier=0.5773502691896257,
        )
        random_checkpoint(directory, config, dtype=torch.bfloat16)
    return directory


@contextlib.asynccontextmanager
async def fused(model: Path, dtype: str) -> AsyncIterator[str]:
    """`grokmoe serve` as a process. Yields its address."""
    settings = ServeSettings(model=str(model), dtype=dtype, port=0)
    process = RoleProcess("serve", 0, "launcher", ["serve", *to_flags(settings)])
    await process.start()
    try:
        await process.wait_ready()
        yield process.address
    finally:
        await process.stop()


@contextlib.asynccontextmanager
async def split(model: Path, dtype: str, experts: int) -> AsyncIterator[str]:
    """`grokmoe up` with one attention worker. Yields its address."""
    async with Cluster(UpSettings(model=str(model), dtype=dtype, experts=experts, port=0)) as cluster:
        yield cluster.address


async def run_load(client: AsyncClient, load: Load, vocab_size: int, seed: int) -> tuple[float, Status, Status]:
    """Seconds, and the router's state before and after. Prompts are random, so no prefix is shared."""
    draw = random.Random(f"{load.name}-{seed}")
    prompts = [[draw.randrange(4, vocab_size) for _ in range(load.prompt)] for _ in range(load.batch)]
    before = await client.status()
    begin = time.perf_counter()
    calls = (client.generate(prompt, max_tokens=load.new, temperature=0, ignore_eos=True) for prompt in prompts)
    await asyncio.gather(*calls)
    return time.perf_counter() - begin, before, await client.status()


def add(result: Result, load: Load, seconds: float, before: Status, after: Status) -> None:
    """Takes one run into a result."""
    tokens = load.batch * (load.prompt if load.new == 1 else load.new)
    steps = after.steps - before.steps
    result.tokens_per_second.append(tokens / seconds)
    result.step.append(seconds / steps * 1e3)
    for now, then in zip(after.legs, before.legs, strict=True):
        result.legs.setdefault(now.leg, []).append((now.total_seconds - then.total_seconds) / steps * 1e3)


async def measure(model: Path, dtype: str, expert_counts: list[int], rounds: int) -> dict[str, dict[str, Result]]:
    """topology -> load -> result. Topologies run one after the other: together they would share the cores."""
    topologies = {"fused": fused(model, dtype)}
    topologies |= {f"split {count}": split(model, dtype, count) for count in expert_counts}
    results: dict[str, dict[str, Result]] = {}
    for name, topology in topologies.items():
        async with topology as address, AsyncClient(address) as client:
            vocab_size = (await client.model()).vocab_size
            results[name] = {load.name: Result() for load in LOADS}
            for load in LOADS:
                await run_load(client, load, vocab_size, -1)
            for seed in range(rounds):
                for load in LOADS:
                    add(results[name][load.name], load, *await run_load(client, load, vocab_size, seed))
    return results


def show(console: Console, results: dict[str, dict[str, Result]]) -> None:
    """One table per load: a row per leg, a column per topology."""
    for load in LOADS:
        table = Table("ms per step, median", title=load.name, title_justify="left", box=None, padding=(0, 2))
        columns = {topology: by_load[load.name] for topology, by_load in results.items()}
        for topology in columns:
            table.add_column(topology, justify="right")
        median = statistics.median
        for leg in next(iter(columns.values())).legs:
            table.add_row(leg, *(f"{median(result.legs[leg]):.3f}" for result in columns.values()))
        other = [median(result.step) - sum(map(median, result.legs.values())) for result in columns.values()]
        table.add_row("other", *(f"{value:.3f}" for value in other))
        table.add_row("whole step", *(f"{median(result.step):.3f}" for result in columns.values()))
        table.add_row("tokens/s", *(f"{median(result.tokens_per_second):.0f}" for result in columns.values()))
        console.print(table)
        console.print()


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("demo", "bench"), default="demo", help="model (default: demo)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "grokmoe", help="where bench is kept")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--experts", default="2,4", help="numbers of expert workers, comma-separated (default: 2,4)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each load (default: 3)")
    options = parser.parse_args()
    model = DEMO_MODEL if options.preset == "demo" else bench_model(options.cache)
    counts = [int(count) for count in options.experts.split(",") if count]
    results = asyncio.run(measure(model, options.dtype, counts, options.rounds))
    show(Console(width=100), results)
    print(json.dumps({name: {k: dataclasses.asdict(v) for k, v in by.items()} for name, by in results.items()}))


if __name__ == "__main__":
    main()
