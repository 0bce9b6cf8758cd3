"""`grokmoe demo`: the split topology with the embedded model, a few texts streamed from it, and where the time went."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from grokmoe import AsyncClient, Completion, Status
from grokmoe.settings import setting
from launcher.paths import DEMO_MODEL
from launcher.up import Cluster, UpSettings

PROMPTS = (
    "KING HENRY.\nOnce more unto the breach, dear friends,",
    "JULIET.\nO Romeo, Romeo,",
    "HAMLET.\nTo be, or not to be,",
    "FIRST WITCH.\nWhen shall we three meet again",
)


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """What `grokmoe demo` takes."""

    model: str = setting(str(DEMO_MODEL), "checkpoint directory; default: the embedded demo model", metavar="DIR")
    experts: int = setting(4, "expert worker processes", metavar="N")
    attention: int = setting(1, "attention worker processes", metavar="M")
    dtype: str = setting("bfloat16", "type to compute in", choices=("float32", "bfloat16"))
    max_tokens: int = setting(80, "tokens per text")
    seed: int = setting(1609, "the same seed writes the same texts")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One text as the client saw it. Seconds from sending the request; num_tokens includes the first."""

    completion: Completion
    first_token: float
    total: float

    @property
    def num_tokens(self) -> int:
        """Tokens generated."""
        return len(self.completion.token_ids)

    @property
    def per_token(self) -> float:
        """Seconds per token after the first (TPOT)."""
        return (self.total - self.first_token) / max(1, self.num_tokens - 1)


async def demo(settings: DemoSettings) -> int:
    """Runs it all. Returns the exit code. Raises StartupError when a process cannot start."""
    console = Console(highlight=False)
    cluster = await _start(settings, console)
    try:
        async with AsyncClient(cluster.address) as client:
            await _warm_up(client)
            before = await client.status()
            measured = [await _stream(client, prompt, settings, console) for prompt in PROMPTS]
            begin = time.perf_counter()
            together = await asyncio.gather(*(_stream(client, prompt, settings, None) for prompt in PROMPTS))
            seconds = time.perf_counter() - begin
            after = await client.status()
    finally:
        await cluster.stop()
    _show_requests(console, "one after the other", measured)
    _show_requests(console, "all at the same time", together)
    num_tokens = sum(each.num_tokens for each in together)
    console.print(f"together: {num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.0f} tokens/s\n")
    _show_experts(console, before, after)
    _show_legs(console, before, after)
    ended = all(process.returncode == 0 for process in cluster.processes)
    console.print("all processes ended cleanly" if ended else "[red]a process did not end cleanly[/]")
    return 0 if ended else 1


async def _start(settings: DemoSettings, console: Console) -> Cluster:
    """The cluster, all its processes ready. Shows progress."""
    up = UpSettings(
        model=settings.model,
        experts=settings.experts,
        attention=settings.attention,
        dtype=settings.dtype,
        port=0,
        log_level="warning",
    )
    num_processes = settings.experts + settings.attention + 1
    with console.status(f"starting {num_processes} processes") as status:
        cluster = Cluster(up, lambda line: console.print(line, style="dim", soft_wrap=True), status.update)
        try:
            await cluster.start()
        except BaseException:
            await cluster.stop()
            raise
    return cluster


async def _warm_up(client: AsyncClient) -> None:
    """One short text that is not measured: kernels are built at their first call."""
    await client.generate(PROMPTS[0], max_tokens=8, temperature=0)


async def _stream(client: AsyncClient, prompt: str, settings: DemoSettings, console: Console | None) -> Measured:
    begin = time.perf_counter()
    first = 0.0
    stream = client.stream(prompt, max_tokens=settings.max_tokens, temperature=0.8, top_p=0.95, seed=settings.seed)
    if console:
        console.rule(style="dim")
        console.print(prompt, end="", style="bold", markup=False)
    async for delta in stream:
        first = first or time.perf_counter() - begin
        if console:
            console.print(delta.text, end="", markup=False)
    if console:
        console.print()
    return Measured(await stream.completion(), first, time.perf_counter() - begin)


def _show_requests(console: Console, title: str, measured: Sequence[Measured]) -> None:
    table = _table(f"requests, {title}", "request", "prompt", "new", "TTFT ms", "TPOT ms", "tokens/s")
    for number, each in enumerate(measured, 1):
        table.add_row(
            str(number),
            str(each.completion.usage.prompt_tokens),
            str(each.num_tokens),
            f"{each.first_token * 1e3:.1f}",
            f"{each.per_token * 1e3:.2f}",
            f"{each.num_tokens / each.total:.0f}",
        )
    console.print(table)


def _show_experts(console: Console, before: Status, after: Status) -> None:
    table = _table("rows per expert, all layers", "expert", "worker", "rows", "share %")
    rows = {now.expert: now.rows - then.rows for now, then in zip(after.placement, before.placement, strict=True)}
    total = max(1, sum(rows.values()))
    for placed in after.placement:
        count = rows[placed.expert]
        workers = ",".join(map(str, placed.workers))
        table.add_row(str(placed.expert), workers, str(count), f"{100 * count / total:.1f}")
    console.print(table)


def _show_legs(console: Console, before: Status, after: Status) -> None:
    steps = max(1, after.steps - before.steps)
    table = _table(f"latency of each leg, mean of {steps} steps", "leg", "ms per step", "share %")
    legs = [
        (now.leg, now.total_seconds - then.total_seconds) for now, then in zip(after.legs, before.legs, strict=True)
    ]
    total = max(1e-9, sum(seconds for _, seconds in legs))
    for leg, seconds in legs:
        table.add_row(leg, f"{seconds / steps * 1e3:.3f}", f"{100 * seconds / total:.1f}")
    table.add_row("sum", f"{total / steps * 1e3:.3f}", "100.0")
    console.print(table)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(first, title=title, title_justify="left", box=None, title_style="bold", padding=(0, 2))
    for column in others:
        table.add_column(column, justify="right")
    return table
