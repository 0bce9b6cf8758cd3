"""What the router asks of a worker, however it is reached. One verb per role, and a description.

Letters: T tokens, N rows, D hidden.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from grokmoe.errors import InternalError, Unavailable
from grokmoe.step_plan import StepPlan, StepResult
from router.legs import Legs
from router.placement import ExpertLayers


@dataclasses.dataclass(frozen=True)
class AttentionInfo:
    """What an attention worker says of itself. is_draining: it is about to end and refuses new plans."""

    config_hash: str
    incarnation: str
    dtype: torch.dtype
    hidden_size: int
    layer_begin: int
    layer_end: int
    num_pages: int
    page_size: int
    max_step_tokens: int
    device: str
    is_draining: bool = False


@dataclasses.dataclass(frozen=True)
class ExpertInfo:
    """What an expert worker says of itself."""

    config_hash: str
    incarnation: str
    dtype: torch.dtype
    experts: tuple[ExpertLayers, ...]
    max_rows: int
    device: str
    is_draining: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertReply:
    """rows_ND: one output row per input row. Times in seconds: waiting in the worker, and computing there."""

    rows_ND: torch.Tensor
    queue: float
    compute: float


class CorruptReply(InternalError):
    """A worker's answer that cannot be one: it contradicts itself, or what was asked."""


class Hole(Protocol):
    """Who fills the MoE of a step's layers."""

    @property
    def is_local(self) -> bool:
        """Whether `fill_now` can be used: every expert is in this process."""

    async def fill(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """MoE input -> MoE output."""

    def fill_now(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """The same on the caller's thread, for experts in this process."""


class StepNotBegun(Unavailable):
    """The worker is lost, and has never seen the plan: the step can have nothing to do with it."""


class AttentionLink(Protocol):
    """A way to one attention worker."""

    address: str

    async def describe(self) -> AttentionInfo:
        """Asks the worker what it is, and takes the lease of its pages or goes on with it.

        Raises Unavailable when it cannot be reached, or another router has the lease.
        """

    async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
        """Runs one step; `hole` fills the MoE of each layer. One step at a time per lane.

        Raises Unavailable (StepNotBegun) when the worker is lost, or with SHUTTING_DOWN when it is about to end and has
        not begun the step; FailedPrecondition when it has another incarnation than the plan, InvalidRequest when it
        refuses the plan, and whatever `hole` raises. The lane can be used again after each.
        """

    async def close(self) -> None:
        """Ends all lanes."""


class ExpertLink(Protocol):
    """A way to one expert worker."""

    address: str

    async def describe(self) -> ExpertInfo:
        """Asks the worker what it is. Raises Unavailable when it cannot be reached."""

    async def forward(
        self,
        lane: int,
        layer: int,
        expert_ids: tuple[int, ...],
        counts: tuple[int, ...],
        rows_ND: torch.Tensor,
        timeout: float | None = None,
    ) -> ExpertReply:
        """Sends rows sorted by expert through the experts of a layer.

        timeout: seconds after which the worker need not begin any more, because nobody waits for the answer. Waiting
        no longer is the caller's part; a call that is cancelled leaves the others alone, and its answer is discarded.
        Raises Unavailable when the worker is lost or about to end, DeadlineExceeded when it had no time to begin,
        CorruptReply when its answer contradicts itself, InvalidRequest when it refuses the request.
        """

    def reset(self, lane: int) -> None:
        """Abandons all that is under way on a lane, and what the worker still owes: those calls are Unavailable."""

    async def close(self) -> None:
        """Ends all lanes."""
