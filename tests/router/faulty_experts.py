"""Expert workers that fail on purpose, each call as its schedule says."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Iterable, Mapping

import torch

from grokmoe.errors import InternalError, Reason, Unavailable
from router.transport.base import ExpertInfo, ExpertReply
from tests.router.tiny import ExpertDouble


class Fault(enum.Enum):
    """DIE: the call is lost, and the worker is away for three probes. HANG: no answer until the call is given up.
    SLOW: an answer after SLOW_SECONDS. NAN, SHAPE, DTYPE: an answer that cannot be. FAIL: an error of its own.
    DRAIN: refuses, being about to end.
    """

    DIE = "die"
    HANG = "hang"
    SLOW = "slow"
    NAN = "nan"
    SHAPE = "shape"
    DTYPE = "dtype"
    FAIL = "fail"
    DRAIN = "drain"


SLOW_SECONDS = 0.05


class FaultyExpert(ExpertDouble):
    """faults: number of the call -> what goes wrong with it. `timeouts`: what every call was given."""

    def __init__(
        self,
        faults: Mapping[int, Fault] | Callable[[int], Fault | None] = {},  # noqa: B006 - never changed
        held: Iterable[int] = range(8),
    ) -> None:
        super().__init__(held)
        self._fault_of = faults if callable(faults) else faults.get
        self._probes_away = 0
        self.timeouts: list[float | None] = []
        self.resets: list[int] = []
        self.num_given_up = 0

    async def describe(self) -> ExpertInfo:
        if self._probes_away:
            self._probes_away -= 1
            raise Unavailable("away")
        return await super().describe()

    async def forward(
        self,
        lane: int,
        layer: int,
        expert_ids: tuple[int, ...],
        counts: tuple[int, ...],
        rows_ND: torch.Tensor,
        timeout: float | None = None,
    ) -> ExpertReply:
        fault = self._fault_of(len(self.calls))
        self.timeouts.append(timeout)
        if fault is Fault.DIE:
            self._probes_away = 3
        if fault is Fault.HANG:
            self.calls.append((layer, expert_ids))
            try:
                await asyncio.Event().wait()
            finally:
                self.num_given_up += 1
        reply = await super().forward(lane, layer, expert_ids, counts, rows_ND, timeout)
        return await _spoil(reply, fault)

    def reset(self, lane: int) -> None:
        self.resets.append(lane)


async def _spoil(reply: ExpertReply, fault: Fault | None) -> ExpertReply:
    rows_ND = reply.rows_ND
    if fault is Fault.DIE:
        raise Unavailable("died")
    if fault is Fault.DRAIN:
        raise Unavailable("about to end", reason=Reason.SHUTTING_DOWN)
    if fault is Fault.FAIL:
        raise InternalError("out of memory")
    if fault is Fault.SLOW:
        await asyncio.sleep(SLOW_SECONDS)
    if fault is Fault.NAN:
        rows_ND = rows_ND.clone()
        rows_ND[-1, 0] = torch.nan
    if fault is Fault.SHAPE:
        rows_ND = rows_ND[:, 1:]
    if fault is Fault.DTYPE:
        rows_ND = rows_ND.bfloat16()
    return ExpertReply(rows_ND, reply.queue, reply.compute)
