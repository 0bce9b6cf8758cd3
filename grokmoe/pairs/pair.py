"""One end of a pair, for an event loop: transfers on a thread of their own, an end that needs no waiting.

Letters: N rows, D their width.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from grokmoe.device_thread import DeviceThread
from grokmoe.errors import Unavailable
from grokmoe.pairs.ranks import GLOO, Ranks, new_ranks
from grokmoe.pairs.rendezvous import meet
from grokmoe.v1 import expert_pb2

OPEN_LIMIT = 10.0
"""Seconds for both ends to be there."""

LEAST_LIMIT = 2.0
"""Seconds that the shortest transfer may take. It begins when the other end has said that it does its part: this bears
with a busy machine and not with a computation."""

SLOWEST = 20e6
"""Bytes a second below which a transfer is given up."""

HELLO = 0x67726F6B
"""What the router's end sends first, and gets back: the path works both ways, and NCCL has connected."""

T = TypeVar("T")


class Rank(enum.IntEnum):
    """Which end this is. The router's speaks first."""

    ROUTER = 0
    WORKER = 1


class PairBroken(Unavailable):
    """The pair is over; whether the rows under way have arrived is not known."""


def transfer_limit(num_bytes: int) -> float:
    """Seconds that a transfer may take."""
    return LEAST_LIMIT + num_bytes / SLOWEST


class Pair:
    """One transfer at a time. Whatever fails, and a caller that does not wait for the end, ends the pair."""

    def __init__(self, offer: expert_pb2.PairOffer, rank: Rank, device: torch.device) -> None:
        """device: where this end's rows are. Gloo takes them through main memory."""
        self.name = offer.name
        self._offer, self._rank = offer, rank
        self._device = torch.device("cpu") if offer.backend == GLOO else device
        self._ranks: Ranks | None = None
        self._thread = DeviceThread(f"pair-{offer.name[:8]}")
        self._thread.post(lambda: torch.set_num_threads(1))  # it copies: a team of its own would fight for the cores
        self.error: PairBroken | None = None

    async def open(self) -> None:
        """Meets the other end, which does the same. Raises PairBroken."""
        await self._run(self._open)

    async def send(self, rows_ND: torch.Tensor) -> None:
        """Returns when the other end has them. Raises PairBroken."""
        if rows_ND.numel():  # of none the other end knows as well
            await self._run(self._send, rows_ND)

    async def receive(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """What the other end sends, which has that shape and type; on the pair's device. Raises PairBroken."""
        if 0 in shape:
            return torch.empty(*shape, dtype=dtype, device=self._device)
        return await self._run(self._receive, shape, dtype)

    def close(self) -> None:
        """Ends it, soon; the other end notices with its next transfer. May be called more than once."""
        self._break("closed")

    def _break(self, why: str) -> PairBroken:
        if self.error is None:
            self.error = PairBroken(f"the pair is over: {why}")
            if self._ranks is not None:
                self._ranks.abort()
            self._thread.post(self._drop)
            self._thread.leave()
        return self.error

    async def _run(self, function: Callable[..., T], *args: object) -> T:
        if self.error is not None:
            raise self.error
        try:
            return await self._thread.run(function, *args)
        except RuntimeError as error:  # torch's own errors are of this kind
            raise self._break(str(error).partition("\n")[0].partition(". ")[0]) from error
        except BaseException:
            self._break("a transfer was cut off")
            raise

    def _open(self) -> None:
        self._ranks = new_ranks(self._offer.backend, meet(self._offer), self._rank, OPEN_LIMIT)
        hello = torch.tensor([HELLO], device=self._device)
        answer = torch.zeros_like(hello)
        if self._rank is Rank.ROUTER:
            self._ranks.send(hello, OPEN_LIMIT)
            self._ranks.receive(answer, OPEN_LIMIT)
        else:
            self._ranks.receive(answer, OPEN_LIMIT)
            self._ranks.send(hello, OPEN_LIMIT)
        if answer.item() != HELLO:
            raise RuntimeError("the other end does not say what it should")

    def _send(self, rows_ND: torch.Tensor) -> None:
        assert self._ranks is not None, "not open"
        self._ranks.send(rows_ND.to(self._device).contiguous(), transfer_limit(rows_ND.nbytes))

    def _receive(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        assert self._ranks is not None, "not open"
        rows_ND = torch.empty(*shape, dtype=dtype, device=self._device)
        self._ranks.receive(rows_ND, transfer_limit(rows_ND.nbytes))
        return rows_ND

    def _drop(self) -> None:
        """Frees the group, which closes its connections."""
        self._ranks = None
