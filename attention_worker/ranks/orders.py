"""What rank 0 tells the others: a header of fixed size, then what it announces. Bytes and tensors, never objects.

A step is announced by its plan, of which followers need what fills the pages and chooses the rows of logits; what only
the sampler looks at stays with rank 0, which alone draws tokens.

Shapes: T tokens of the step, D hidden, R rows.
"""

from __future__ import annotations

import dataclasses
import enum

import torch

from attention_worker.sharding.messages import Messages
from grokmoe.plan_codec import num_payload_rows, plan_from_proto, plan_payload, plan_to_proto
from grokmoe.step_plan import GREEDY, SequenceChunk, StepPlan
from grokmoe.v1 import attention_pb2

PATIENCE = 6.0
"""Timeouts that followers wait for an order. Between two of them rank 0 may have work that is not theirs, such as
drawing tokens; that it has ended is seen at once all the same."""


class OrderKind(enum.IntEnum):
    """What to do.

    BEAT: say that you are there. SERVE: the start is over, the usual timeout holds from now on.
    BEGIN: a step, up to its first hole. GO_ON: up to the next one, with the MoE output of the last. DROP: a step that
    nobody waits for. END: the worker ends.
    """

    BEAT = 1
    SERVE = 2
    BEGIN = 3
    GO_ON = 4
    DROP = 5
    END = 6


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """kind; step: which, of several under way; num_bytes: of the plan that follows; has_rows: whether a residual
    follows, or what some tokens begin with."""

    kind: OrderKind
    step: int = 0
    num_bytes: int = 0
    has_rows: bool = False

    def to_tensor(self) -> torch.Tensor:
        """int64 [4]."""
        return torch.tensor((self.kind, self.step, self.num_bytes, self.has_rows), dtype=torch.int64)

    @classmethod
    def from_tensor(cls, header: torch.Tensor) -> Order:
        """ValueError for a kind that there is not."""
        kind, step, num_bytes, has_rows = header.tolist()
        return cls(OrderKind(kind), step, num_bytes, bool(has_rows))


class Orders:
    """The two ends of the line. host: for what is in host memory; device: for tensors of the model."""

    def __init__(self, host: Messages, device: Messages, torch_device: torch.device) -> None:
        self.host, self.device, self._torch_device = host, device, torch_device

    def set_timeout(self, seconds: float) -> None:
        """How far ranks may be behind each other from now on."""
        self.host.timeout = self.device.timeout = seconds

    def tell(self, order: Order) -> None:
        """One without anything behind it."""
        self.host.tell(order.to_tensor())

    def tell_begin(self, step: int, plan: StepPlan) -> None:
        """BEGIN, with all that followers need of the plan."""
        data = plan_to_proto(_for_followers(plan)).SerializeToString()
        rows_RD = plan_payload(plan)
        self.tell(Order(OrderKind.BEGIN, step, len(data), rows_RD is not None))
        self.host.tell(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        if rows_RD is not None:
            self.device.tell(rows_RD.to(self._torch_device).contiguous())

    def tell_go_on(self, step: int, moe_TD: torch.Tensor) -> torch.Tensor:
        """GO_ON. Returns the MoE output, on the model's device."""
        self.tell(Order(OrderKind.GO_ON, step))
        moe_TD = moe_TD.to(self._torch_device).contiguous()
        self.device.tell(moe_TD)
        return moe_TD

    def hear(self) -> Order:
        """The next one."""
        header = Order(OrderKind.BEAT).to_tensor()
        self.host.hear(header, PATIENCE)
        return Order.from_tensor(header)

    def hear_plan(self, order: Order, hidden_size: int) -> StepPlan:
        """What follows a BEGIN."""
        data = torch.empty(order.num_bytes, dtype=torch.uint8)
        self.host.hear(data)
        plan = attention_pb2.StepPlan.FromString(data.numpy().tobytes())
        if not order.has_rows:
            return plan_from_proto(plan)
        num_rows = num_payload_rows(plan, is_hidden_state=True)
        rows_RD = torch.empty(num_rows, hidden_size, device=self._torch_device)
        self.device.hear(rows_RD)
        return plan_from_proto(plan, rows_RD)

    def hear_rows(self, like_TD: torch.Tensor) -> torch.Tensor:
        """What follows a GO_ON. like_TD: the MoE input; the output has its shape and type."""
        moe_TD = torch.empty(like_TD.shape, dtype=like_TD.dtype, device=self._torch_device)
        self.device.hear(moe_TD)
        return moe_TD


def _for_followers(plan: StepPlan) -> StepPlan:
    return StepPlan(plan.incarnation, tuple(map(_chunk_for_followers, plan.chunks)))


def _chunk_for_followers(chunk: SequenceChunk) -> SequenceChunk:
    """How a token is drawn may be as long as the vocabulary; that one is drawn is all that followers need."""
    return chunk if chunk.sampling is None else dataclasses.replace(chunk, sampling=GREEDY)
