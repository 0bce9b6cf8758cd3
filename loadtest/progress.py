"""How the run is going, on standard error of a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.crew import Show
from loadtest.job import Counts


@contextlib.contextmanager
def progress(console: Console, title: str, total: int, is_on: bool) -> Iterator[Show]:
    """Shows counts as they come; nothing where nobody looks."""
    if not is_on or not console.is_terminal:
        yield lambda counts: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, said="")
        last = [time.monotonic(), 0.0]

        def show(counts: Counts) -> None:
            now = time.monotonic()
            rate = (counts.tokens - last[1]) / max(now - last[0], 1e-9)
            last[:] = now, counts.tokens
            said = f"{counts.sent - counts.ended} under way, {counts.failed} failed, {rate:.0f} tokens/s"
            bar.update(task, completed=counts.ended, said=f"{said}, worst lag {counts.worst_lag * 1e3:.1f} ms")

        yield show
