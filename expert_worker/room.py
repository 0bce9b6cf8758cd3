"""How much memory there is for experts, and giving back what was freed."""

from __future__ import annotations

import ctypes
import errno
import functools
from collections.abc import Callable
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")

UNKNOWN = 1 << 62
"""Bytes that are free where nothing says how many."""


def free_bytes(device: torch.device) -> int:
    """What can be allocated there without the system ending somebody for it: of the machine, and of the container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_of_machine(), _of_container())


def _of_machine() -> int:
    try:
        lines = MEMINFO.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return UNKNOWN


def _of_container() -> int:
    """By cgroup v2, as a container sees its own. Its file pages count as free: reading a checkpoint makes many."""
    try:
        limit = int((CGROUP / "memory.max").read_text())  # "max": not a number, no limit
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return UNKNOWN


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed. Of the CPU's torch only the message says so."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )
    return told or isinstance(error, (MemoryError, torch.OutOfMemoryError))


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back(device: torch.device) -> None:
    """Returns to the system what was freed: both allocators would keep it for themselves. glibc's does so below 32 MiB
    each, and other C libraries have no such call."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
