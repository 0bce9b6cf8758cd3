"""A process group of two ranks: tensors to the other one and from it, by calls that block.

These are torch's backends themselves and not `torch.distributed.send`: that works on a process's one default group and
on subsets of it, which all of its processes must make together.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed

from grokmoe.errors import FailedPrecondition
from grokmoe.pairs.rendezvous import Store

dist: Any = torch.distributed  # its stubs know other backends than it has

GLOO, NCCL = "gloo", "nccl"
BACKENDS = (GLOO, NCCL)

NUM_RANKS = 2

POLL = 20e-6
"""Seconds between two looks at whether a transfer by NCCL is done: less than such a transfer takes."""

NCCL_ENVIRONMENT = {
    # What goes wrong on one pair ends that pair: a process must outlive its peers. By default torch's watchdog ends it.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


def check_backend(backend: str, device: torch.device) -> None:
    """Raises FailedPrecondition when rows on `device` cannot go by that backend."""
    if backend not in BACKENDS:
        raise FailedPrecondition(f"there is no backend {backend!r}, only {', '.join(BACKENDS)}")
    if not dist.is_available() or not dist.is_backend_available(backend):
        raise FailedPrecondition(f"torch was built without {backend}")
    if backend == NCCL and device.type != "cuda":
        raise FailedPrecondition(f"nccl moves what is on GPUs, the rows are on {device}")


class Ranks(Protocol):
    """One end. Not to be used any more after an error. Each call raises RuntimeError when the other end is gone, or
    has not done its part within `limit` seconds, or `abort` was called meanwhile."""

    def send(self, tensor: torch.Tensor, limit: float) -> None:
        """Returns when the other end has it. tensor: contiguous, on the pair's device."""

    def receive(self, into: torch.Tensor, limit: float) -> None:
        """Fills `into` with what the other end sends, which has that many bytes."""

    def abort(self) -> None:
        """Ends a call under way on another thread, where the backend can."""


class GlooRanks:
    """Over TCP, between tensors in main memory."""

    def __init__(self, store: Store, rank: int, limit: float) -> None:
        """Blocks until both are there. limit: seconds. Raises RuntimeError."""
        self._group: Any = dist.ProcessGroupGloo(store, rank, NUM_RANKS, timedelta(seconds=limit))
        self._other = 1 - rank

    def send(self, tensor: torch.Tensor, limit: float) -> None:
        """See Ranks."""
        self._group.send([tensor], self._other, 0).wait(timedelta(seconds=limit))

    def receive(self, into: torch.Tensor, limit: float) -> None:
        """See Ranks."""
        self._group.recv([into], self._other, 0).wait(timedelta(seconds=limit))

    def abort(self) -> None:
        """See Ranks. Gloo has no such thing: a call under way ends at its limit, which is short."""


class NcclRanks:
    """Between tensors on GPUs. Has never run: no machine with two GPUs was at hand. Its tests replace the group."""

    def __init__(self, store: Store, rank: int, limit: float) -> None:
        """Does not wait for the other one: NCCL connects with the first transfer."""
        for name, value in NCCL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        options = dist.ProcessGroupNCCL.Options()
        self._group: Any = dist.ProcessGroupNCCL(store, rank, NUM_RANKS, options)
        self._group.set_timeout(timedelta(seconds=limit))
        self._other = 1 - rank
        self._is_aborted = False

    def send(self, tensor: torch.Tensor, limit: float) -> None:
        """See Ranks."""
        self._finish(self._group.send([tensor], self._other, 0), limit)

    def receive(self, into: torch.Tensor, limit: float) -> None:
        """See Ranks."""
        self._finish(self._group.recv([into], self._other, 0), limit)

    def _finish(self, work: Any, limit: float) -> None:
        """Waits for the device by looking: `work.wait` would only put the transfer before what is queued later."""
        until = time.monotonic() + limit
        while not work.is_completed():
            if self._is_aborted or time.monotonic() > until:
                self._group.abort()
                raise RuntimeError("aborted" if self._is_aborted else f"no end of a transfer within {limit:.2f} s")
            time.sleep(POLL)
        work.wait()  # raises what has ended it

    def abort(self) -> None:
        """See Ranks. The thread that waits does it: NCCL's abort may block, and whoever calls this must not."""
        self._is_aborted = True


def new_ranks(backend: str, store: Store, rank: int, limit: float) -> Ranks:
    """One end by the name of its backend."""
    return GlooRanks(store, rank, limit) if backend == GLOO else NcclRanks(store, rank, limit)
