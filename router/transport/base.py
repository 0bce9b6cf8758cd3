"""What the router asks of a worker, however it is reached. One verb per role, and a description.

Letters: T tokens, N rows, D hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from grokmoe.adapter import AdapterInfo
from grokmoe.errors import InternalError, Unavailable
from grokmoe.step_plan import StepPlan, StepResult
from router.legs import Legs
from router.placement import ExpertLayers


@dataclasses.dataclass(frozen=True)
class AttentionInfo:
    """What an attention worker says of itself, or a pipeline of several (router/transport/pipeline.py).

    is_draining: it is about to end and refuses new plans. stages: a pipeline's, in the order of their layers.
    num_ranks: processes that share out what it has of the model.
    adapters: those that plans can name.
    """

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
    stages: tuple[PipelineStage, ...] = ()
    num_ranks: int = 1

    @property
    def place(self) -> str:
        """Where it computes, for people: `cuda:0`, or `cuda:0 x 8` for eight ranks of which the first is there."""
        return self.device if self.num_ranks == 1 else f"{self.device} x {self.num_ranks}"

    adapters: tuple[AdapterInfo, ...] = ()


@dataclasses.dataclass(frozen=True)
class PipelineStage:
    """One attention worker of a pipeline."""

    address: str
    info: AttentionInfo


@dataclasses.dataclass(frozen=True)
class ExpertInfo:
    """What an expert worker says of itself.

    revision: grows whenever `experts` changes. expert_bytes: what one expert of one layer takes. capacity: most of
    them it can hold; 0: as many as its memory takes. expert_dtype: what the weights are stored in; empty: dtype.
    """

    config_hash: str
    incarnation: str
    dtype: torch.dtype
    experts: tuple[ExpertLayers, ...]
    max_rows: int
    device: str
    is_draining: bool = False
    revision: int = 0
    loading: tuple[ExpertLayers, ...] = ()
    expert_bytes: int = 0
    capacity: int = 0
    expert_dtype: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertReply:
    """rows_ND: one output row per input row. Times in seconds: waiting in the worker, and computing there.

    revision: see ExpertInfo. batch_rows: rows that were computed together, ours included; 0: not said.
    """

    rows_ND: torch.Tensor
    queue: float
    compute: float
    revision: int = 0
    batch_rows: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """What loading experts cost: bytes of weights, and seconds in the worker."""

    num_bytes: int
    seconds: float


class CorruptReply(InternalError):
    """A worker's answer that cannot be one: it contradicts itself, or what was asked."""


class Hole(Protocol):
    """Who fills the MoE of a step's layers."""

    @property
    def is_local(self) -> bool:
        """Whether `fill_now` can be used: every expert is in this process."""

    @property
    def can_be_recorded(self) -> bool:
        """Whether `record` can be used."""

    async def fill(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """MoE input -> MoE output."""

    def fill_now(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """The same on the caller's thread, for experts in this process."""

    def record(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """The same while loops are recorded (`grokmoe.recording`)."""


@runtime_checkable
class FollowsStages(Protocol):
    """A hole that is told when a step goes on to another stage of a pipeline."""

    def stage_begins(self, address: str) -> None:
        """The stage at this address has to answer now; the one before has done its part."""


class StepNotBegun(Unavailable):
    """The worker is lost, and has never seen the plan: the step can have nothing to do with it."""


class AttentionLink(Protocol):
    """A way to one attention worker, or to several that make a pipeline.

    num_stages: workers that a step goes through one after another.
    """

    address: str
    num_stages: int

    async def describe(self) -> AttentionInfo:
        """Asks the worker what it is, and takes the lease of its pages or goes on with it.

        Raises Unavailable when it cannot be reached, or another router has the lease.
        """

    async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
        """Runs one step; `hole` fills the MoE of each layer held. One step at a time per lane.

        Without the first layer it begins with the plan's hidden state, without the last it ends with the result's.

        Raises Unavailable (StepNotBegun) when the worker is lost, or with SHUTTING_DOWN when it is about to end and has
        not begun the step; FailedPrecondition when it has another incarnation than the plan, InvalidRequest when it
        refuses the plan, and whatever `hole` raises. The lane can be used again after each.
        """

    async def load_adapter(self, name: str) -> AdapterInfo:
        """Has the worker load the adapter that its operator has given this name.

        Raises Unavailable when it cannot be reached, NotFound, FailedPrecondition for files that cannot be used,
        ResourceExhausted.
        """

    async def unload_adapter(self, adapter_id: str) -> None:
        """Has the worker forget an adapter; one that it does not have is no error. Raises Unavailable."""

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
        CorruptReply when its answer contradicts itself, FailedPrecondition with EXPERT_NOT_HELD when it has given one
        of the experts up, InvalidRequest when it refuses the request.
        """

    async def load(self, config_hash: str, experts: Sequence[ExpertLayers], timeout: float) -> Loaded:
        """Has the worker load experts from its own checkpoint, and waits until they can be called.

        timeout: seconds. A call that is given up has loaded nothing.
        Raises Unavailable when the worker is lost, DeadlineExceeded, ResourceExhausted with NO_ROOM, and what else it
        refuses with.
        """

    async def unload(self, config_hash: str, experts: Sequence[ExpertLayers]) -> None:
        """Has the worker give experts up; what it does not hold is no error. Raises Unavailable when it is lost."""

    def watch(self, on_end: Callable[[str], None]) -> None:
        """on_end: from now on told why when the worker goes away while no call is under way."""
        ...

    def reset(self, lane: int) -> None:
        """Abandons all that is under way on a lane, and what the worker still owes: those calls are Unavailable."""

    async def close(self) -> None:
        """Ends all lanes."""
