"""A rank that does what rank 0 does, as it is told: the same steps, in the same order, on its own part of the model."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from attention_worker.model import Forward
from attention_worker.ranks.orders import Order, OrderKind, Orders
from grokmoe.step_plan import StepPlan


class Follower:
    """Its steps under way, and what it does with each order.

    leaving: to be set when this rank is asked to end. Rank 0 hears of it with the next beat, lets the worker finish
    what it has begun, and tells all to end.
    """

    def __init__(
        self, orders: Orders, forward: Callable[[StepPlan], Forward], hidden_size: int, timeout: float
    ) -> None:
        """forward: of a plan that rank 0 has checked. timeout: seconds, from the end of the start on."""
        self._orders, self._forward, self._hidden_size, self._timeout = orders, forward, hidden_size, timeout
        self._steps: dict[int, tuple[Forward, torch.Tensor]] = {}
        self.leaving = threading.Event()

    @torch.inference_mode()
    def follow(self) -> None:
        """Returns when told to end. Raises RankLost when another rank has ended or is silent."""
        while (order := self._orders.hear()).kind is not OrderKind.END:
            self._obey(order)

    @property
    def num_steps(self) -> int:
        """Under way."""
        return len(self._steps)

    def _obey(self, order: Order) -> None:
        match order.kind:
            case OrderKind.BEAT:
                self._orders.host.collect(torch.tensor([self.leaving.is_set()], dtype=torch.int64))
            case OrderKind.SERVE:
                self._orders.set_timeout(self._timeout)
            case OrderKind.BEGIN:
                forward = self._forward(self._orders.hear_plan(order, self._hidden_size))
                self._keep(order.step, forward, None)
            case OrderKind.GO_ON:
                forward, x_TD = self._steps.pop(order.step)
                self._keep(order.step, forward, self._orders.hear_rows(x_TD))
            case OrderKind.DROP:
                self._steps.pop(order.step)[0].close()

    def _keep(self, step: int, forward: Forward, moe_TD: torch.Tensor | None) -> None:
        """Up to the next hole; a step at its end is forgotten."""
        try:
            self._steps[step] = forward, forward.send(moe_TD)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration:
            return
