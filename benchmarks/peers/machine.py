"""The machine a race runs on, and how much of it others use meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch


def describe() -> str:
    """Processor, cores, memory, torch."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, torch {torch.__version__}"


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []


@dataclasses.dataclass
class Foreign:
    """share: what processes other than this one and its children used of the machine, 0 to 1; set when it is over."""

    share: float = 0.0


@contextlib.contextmanager
def foreign() -> Iterator[Foreign]:
    """Watches the block. Children that it starts must have ended when it ends: the kernel adds them up then."""
    found = Foreign()
    begin, busy, own = time.monotonic(), _busy(), _own()
    try:
        yield found
    finally:
        seconds = (time.monotonic() - begin) * (os.cpu_count() or 1)
        found.share = max(0.0, (_busy() - busy) - (_own() - own)) / seconds


def _busy() -> float:
    """CPU seconds of all processes since the machine's start; 0 where nobody says."""
    lines = _lines("/proc/stat")
    if not lines:
        return 0.0
    user, nice, system, _, _, irq, softirq = map(int, lines[0].split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)
