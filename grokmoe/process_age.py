"""How long this process has existed: from before its first line of Python, which an import of torch is long after."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/self/stat")
_STARTED = time.monotonic()


def process_age() -> float:
    """Seconds. Where the system does not say, since this module was loaded."""
    try:
        # The name of the program, in parentheses, may have blanks in it. Field 22 is the start, in ticks since boot.
        fields = _STAT.read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _STARTED
