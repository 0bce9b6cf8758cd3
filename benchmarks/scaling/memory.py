"""What processes hold, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path

MIB = 1 << 20


def resident_bytes(pid: int) -> int:
    """Now in memory."""
    return _status(pid, "VmRSS")


def peak_bytes(pid: int) -> int:
    """Most that was ever in memory at once."""
    return _status(pid, "VmHWM")


def _status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise ValueError(f"process {pid} has no {field}: it has ended")
