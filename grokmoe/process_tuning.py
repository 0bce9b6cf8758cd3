"""What a computing process sets before it loads torch: how threads spin, how much oneDNN remembers, large pages."""

from __future__ import annotations

import os

GOMP_SPINCOUNT = "10000"
"""A team of OpenMP threads waits for its next task by spinning. By default it does so for milliseconds, which costs a
neighbour on the same core that long for every operation: a small product takes 8 ms instead of 0.03 as soon as
something else runs. This count spins for some ten microseconds, then sleeps, and costs nothing on idle cores
(docs/log.md)."""


KEPT_PRIMITIVES = "256"
"""oneDNN builds a kernel for every number of rows that a product meets, about a millisecond and half a MiB each, and
keeps 1024 of them in each of two caches. Decode steps come back to a few hundred; prompts of all lengths would fill a
process with a GiB of kernels that are hardly used again (docs/log.md)."""


LARGE_PAGES = "1"
"""torch asks for pages of 2 MiB for what is larger than that. A decode step reads every weight once, and with pages of
4 KiB the look-up of pages is a tenth of its time (docs/log.md). Where the kernel never gives large pages, nothing
changes."""


def tune_process() -> None:
    """Applies it, unless the user has chosen otherwise in the environment."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", LARGE_PAGES)
    os.environ.setdefault("LRU_CACHE_CAPACITY", KEPT_PRIMITIVES)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KEPT_PRIMITIVES)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", GOMP_SPINCOUNT)
