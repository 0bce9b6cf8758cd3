"""An attention worker that fails in the way and at the step that a test says, and comes back."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from grokmoe.errors import FailedPrecondition, Reason, Unavailable
from grokmoe.step_plan import StepPlan, StepResult
from router.legs import Legs
from router.transport.base import AttentionInfo, Hole
from router.transport.local import LocalAttentionLink
from tests.router.tiny import attention_link


class Fault(enum.Enum):
    """DIE: computed, but the answer is lost, and the worker starts anew. DROP: the connection breaks, the worker lives.
    LEASED: another router has the pages. HANG: no answer until it is cut off. DRAIN: refuses, being about to end, and
    starts anew. BUG: a link that raises what no link may. NAN: a chunk is not finite, and
    its token nonsense.
    """

    DIE = "die"
    DROP = "drop"
    LEASED = "leased"
    HANG = "hang"
    DRAIN = "drain"
    BUG = "bug"
    NAN = "nan"


class FaultyAttention:
    """A link. faults: number of the step -> what happens at it; `always`: at every step, for good.

    is_up: whether it can be reached; None: it is silent. `incarnations`: those it was described as. sizes: of
    `attention_engine`.
    """

    num_stages = 1

    def __init__(
        self,
        faults: Mapping[int, Fault] | None = None,
        always: Fault | None = None,
        address: str = "faulty",
        **sizes: Any,
    ) -> None:
        self.address = address
        self.faults, self.always = dict(faults or {}), always
        self.is_up: bool | None = True
        self.is_draining = False
        self.num_steps = self.num_cut_off = self.num_closed = 0
        self.incarnations: list[str] = []
        self._sizes = sizes
        self._link: LocalAttentionLink = attention_link(**sizes)

    def restart(self) -> None:
        """The process is another one."""
        self._link, self.is_draining = attention_link(**self._sizes), False

    async def describe(self) -> AttentionInfo:
        if self.is_up is None:
            await asyncio.Event().wait()
        if not self.is_up:
            raise Unavailable("gone")
        info = await self._link.describe()
        self.incarnations.append(info.incarnation)
        return dataclasses.replace(info, is_draining=self.is_draining)

    async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
        number, self.num_steps = self.num_steps, self.num_steps + 1
        fault = self.always or self.faults.get(number)
        if not self.is_up or fault is Fault.DROP:
            raise Unavailable("the connection broke")
        if self.is_draining:
            raise Unavailable("about to end", reason=Reason.SHUTTING_DOWN)
        if fault is Fault.HANG:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.num_cut_off += 1
                raise
        if fault is Fault.BUG:
            raise ZeroDivisionError("x / 0")
        if fault is Fault.DRAIN:
            self.restart()
            raise Unavailable("about to end", reason=Reason.SHUTTING_DOWN)
        if fault is Fault.LEASED:
            self.restart()
            raise FailedPrecondition("another incarnation", reason=Reason.WRONG_INCARNATION)
        link = self._link
        result = await link.step(lane, plan, hole, legs)
        if fault is Fault.DIE:
            self.restart()
        if link is not self._link:
            raise Unavailable("died")
        if fault is Fault.NAN:
            place = number % len(plan.chunks)
            if result.hidden_state is not None:
                return dataclasses.replace(result, faulty_chunks=(place,))
            drawn = iter(result.token_ids)
            tokens = [(each, next(drawn)) for each, chunk in enumerate(plan.chunks) if chunk.sampling is not None]
            token_ids = tuple(7 if each == place else token_id for each, token_id in tokens)
            return dataclasses.replace(result, token_ids=token_ids, faulty_chunks=(place,))
        return result

    async def close(self) -> None:
        self.num_closed += 1
