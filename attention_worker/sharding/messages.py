"""How tensors go from rank to rank. Every rank calls the same verbs in the same order.

By messages from one to another on hosts, where they are the fastest way (docs/log.md): gloo's collectives hand each
call to a thread of their own. By collectives between GPUs, which is NCCL's way.

Letters: S ranks.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist


class RankLost(Exception):  # not of grokmoe.errors: it is never answered, it ends the worker
    """A rank has ended, or was silent for too long. The ranks are out of step from now on, for good."""


class Messages(Protocol):
    """The verbs. timeout: seconds that another rank may be behind; longer raises RankLost."""

    rank: int
    size: int
    timeout: float

    def all(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's x, in the order of the ranks, [S, ...]. All have the same shape and type."""

    def swap(self, x_S: torch.Tensor) -> torch.Tensor:
        """What every rank has for this one, in the order of the ranks. x_S: what this one has for each."""

    def collect(self, x: torch.Tensor) -> torch.Tensor | None:
        """`all`, on rank 0 alone."""

    def tell(self, x: torch.Tensor) -> None:
        """Rank 0's x to all others, who `hear` it."""

    def hear(self, x: torch.Tensor, patience: float = 1.0) -> None:
        """Rank 0's x, written into a contiguous tensor of the same shape and type. patience: timeouts to wait."""


class HostMessages:
    """Through gloo, from rank to rank. Tensors are in host memory."""

    def __init__(self, group: dist.ProcessGroupGloo, timeout: float) -> None:
        self.rank, self.size, self.timeout = group.rank(), group.size(), timeout
        self._group = group
        self._others = [rank for rank in range(self.size) if rank != self.rank]

    def all(self, x: torch.Tensor) -> torch.Tensor:
        """See Messages."""
        return self.swap(x.expand(self.size, *x.shape))

    def swap(self, x_S: torch.Tensor) -> torch.Tensor:
        """See Messages."""
        got_S = torch.empty(x_S.shape, dtype=x_S.dtype)
        if x_S.numel():
            works = [self._group.send([x_S[rank].contiguous()], rank, _AMONG) for rank in self._others]
            works += [self._group.recv([got_S[rank]], rank, _AMONG) for rank in self._others]
            got_S[self.rank] = x_S[self.rank]
            self._wait(works)
        return got_S

    def collect(self, x: torch.Tensor) -> torch.Tensor | None:
        """See Messages."""
        x = x.contiguous()
        if self.rank:
            if x.numel():
                self._wait([self._group.send([x], 0, _AMONG)])
            return None
        got_S = x.new_empty(self.size, *x.shape)
        if x.numel():
            works = [self._group.recv([got_S[rank]], rank, _AMONG) for rank in self._others]
            got_S[0] = x
            self._wait(works)
        return got_S

    def tell(self, x: torch.Tensor) -> None:
        """See Messages."""
        self._wait([self._group.send([x], rank, _FROM_FIRST) for rank in self._others])

    def hear(self, x: torch.Tensor, patience: float = 1.0) -> None:
        """See Messages."""
        self._wait([self._group.recv([x], 0, _FROM_FIRST)], patience)

    def _wait(self, works: Iterable[Any], patience: float = 1.0) -> None:
        _wait(works, self.timeout * patience)


class DeviceMessages:
    """Through NCCL's collectives, or those of any other backend. Tensors are where the backend wants them."""

    def __init__(self, group: Any, timeout: float) -> None:
        """group: of torch.distributed, such as ProcessGroupNCCL."""
        self.rank, self.size = group.rank(), group.size()
        self._group = group
        self.timeout = timeout

    @property
    def timeout(self) -> float:
        """See Messages. NCCL's calls return before the ranks have met: a thread of the backend minds the time."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._timeout = seconds
        self._group._set_default_timeout(datetime.timedelta(seconds=seconds))

    def all(self, x: torch.Tensor) -> torch.Tensor:
        """See Messages."""
        got_S = x.new_empty(self.size, *x.shape)
        if x.numel():
            # The call wants what it gathers one after the other along the first dimension, not a new one.
            self._wait(self._group._allgather_base(got_S.view(-1), x.contiguous().view(-1)))
        return got_S

    def swap(self, x_S: torch.Tensor) -> torch.Tensor:
        """See Messages."""
        got_S = x_S.new_empty(x_S.shape)
        if x_S.numel():
            self._wait(self._group.alltoall_base(got_S, x_S.contiguous(), [], []))
        return got_S

    def collect(self, x: torch.Tensor) -> torch.Tensor | None:
        """See Messages."""
        got_S = self.all(x)
        return None if self.rank else got_S

    def tell(self, x: torch.Tensor) -> None:
        """See Messages."""
        self._wait(self._group.broadcast(x, 0))

    def hear(self, x: torch.Tensor, patience: float = 1.0) -> None:
        """See Messages."""
        self._wait(self._group.broadcast(x, 0), patience)

    def _wait(self, work: Any, patience: float = 1.0) -> None:
        _wait([work], self.timeout * patience)


_FROM_FIRST, _AMONG = 0, 1
"""Tags: what rank 0 says, and what ranks say to each other, cannot be taken for one another."""


def _wait(works: Iterable[Any], timeout: float) -> None:
    limit = datetime.timedelta(seconds=timeout)
    try:
        for work in works:
            work.wait(limit)
    except RuntimeError as error:
        raise RankLost(str(error).splitlines()[0]) from error
