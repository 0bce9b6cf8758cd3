"""One step in flight, and how it is cut off: when its worker takes too long, or when nobody wants it any more.

        RUNNING --answer--> over
           |  +--limit----> HUNG
           +--abandon-----> ABANDONED

The worker's clock runs from a message to it until its answer; it stands still while the MoE of a layer is filled, for
that is another worker's time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import torch

from grokmoe.errors import Cancelled, Unavailable
from grokmoe.step_plan import StepResult
from router.transport.base import Hole


class StepHung(Unavailable):
    """The attention worker has not answered in time."""


class StepAbandoned(Cancelled):
    """The step was cut off from this side."""


class StepWatch:
    """The life of one step. at: the stage of a pipeline that it is in, by its address; empty: there is none."""

    def __init__(self, allowance: Callable[[], float | None], observe: Callable[[float], None]) -> None:
        """allowance: seconds that the worker may take for its next answer; None: as many as the link lets it.
        observe: receives the seconds that every answer took."""
        self._allowance, self._observe = allowance, observe
        self.at = ""
        self._limit = asyncio.timeout(None)
        self._is_running = self._is_abandoned = False
        self._asked_at: float | None = None
        self._allowed: float | None = None

    async def run(self, call: Callable[[Hole], Awaitable[StepResult]], hole: Hole) -> StepResult:
        """Runs the step. call: starts it with a hole.

        Raises StepHung, StepAbandoned, and what `call` raises. A hole that is filled in this process is not timed: one
        task of the device computes the whole step.
        """
        try:
            async with self._limit:
                if self._is_abandoned:
                    raise StepAbandoned("nobody wants this step any more")
                self._is_running = True
                if hole.is_local:
                    return await call(hole)
                self.asked()
                result = await call(WatchedHole(hole, self))
                self.answered()
                return result
        except TimeoutError:
            if not self._limit.expired():
                raise
            if self._is_abandoned:
                raise StepAbandoned("nobody wants this step any more") from None
            raise StepHung(f"no answer to a step for {self._allowed or 0:.2f} s") from None
        finally:
            self._is_running = False

    def asked(self) -> None:
        """The worker has to answer now."""
        self._asked_at = time.monotonic()
        self.rearm()

    def answered(self) -> None:
        """It has."""
        assert self._asked_at is not None
        self._observe(time.monotonic() - self._asked_at)
        self._asked_at = None
        self.rearm()

    def stage_begins(self, address: str) -> None:
        """Another worker has to answer: the one before has done its part, so its time ends."""
        if self.at:
            self.answered()
            self.asked()
        self.at = address

    def rearm(self) -> None:
        """The allowance may be another one now; it counts from when the worker was asked."""
        if self._is_abandoned:
            return
        if self._asked_at is None:
            self._cut_off_at(None)
            return
        self._allowed = self._allowance()
        left = None if self._allowed is None else self._asked_at + self._allowed - time.monotonic()
        self._cut_off_at(None if left is None else asyncio.get_running_loop().time() + left)

    def abandon(self) -> None:
        """Cuts the step off, whatever it waits for. Harmless when it is over."""
        if not self._is_abandoned:
            self._is_abandoned = True
            self._cut_off_at(asyncio.get_running_loop().time())

    def _cut_off_at(self, when: float | None) -> None:
        if self._is_running and not self._limit.expired():
            self._limit.reschedule(when)


class WatchedHole:
    """A hole that tells a watch when the worker has answered, and when it, or the next stage, is asked again."""

    is_local = can_be_recorded = False

    def __init__(self, hole: Hole, watch: StepWatch) -> None:
        self._hole, self._watch = hole, watch

    async def fill(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """See Hole."""
        self._watch.answered()
        try:
            return await self._hole.fill(layer, x_TD)
        finally:
            self._watch.asked()

    def stage_begins(self, address: str) -> None:
        """See FollowsStages."""
        self._watch.stage_begins(address)

    def fill_now(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """Never: the experts are elsewhere."""
        raise AssertionError("experts are remote")

    record = fill_now
