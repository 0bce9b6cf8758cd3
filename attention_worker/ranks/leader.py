"""Rank 0's part beside its own computing: it tells the others of every step, in the order in which it computes itself.

All of it happens on the device thread, so that orders and collectives come in one order. Letters: T tokens, D hidden.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable

import torch

from attention_worker.model import Forward
from attention_worker.ranks.orders import Order, OrderKind, Orders
from grokmoe.device_thread import DeviceThread
from grokmoe.step_plan import StepPlan

logger = logging.getLogger(__name__)

BEATS_PER_TIMEOUT = 4
"""How often in a timeout a resting worker shows that it is there: often enough that a beat or two may be late."""


class Leader:
    """Tells followers what to do, and notices when one of them no longer does it.

    A rank that fails leaves the others in the middle of a step that cannot be finished, and none of them can tell how
    far the others came. So any failure is the worker's: `fail` is called with a reason, once, and does not return in
    production.
    """

    def __init__(
        self,
        orders: Orders,
        device: DeviceThread,
        fail: Callable[[str], object],
        leave: Callable[[], object],
    ) -> None:
        """leave: called when a follower was asked to end, so that the worker ends in order while all are there."""
        self._orders, self._device, self._fail, self._leave = orders, device, fail, leave
        self._steps = itertools.count()
        self._ending = threading.Event()
        self._is_leaving = False
        self._heart: threading.Thread | None = None

    def lead(self, plan: StepPlan, forward: Forward) -> Forward:
        """The same forward, which all ranks compute. One that is closed before its end is dropped by all."""
        step = next(self._steps)
        try:
            self._orders.tell_begin(step, plan)
            x_TD = next(forward)
            while True:
                moe_TD = yield x_TD
                x_TD = forward.send(self._orders.tell_go_on(step, moe_TD))
        except StopIteration as end:
            logits_RV: torch.Tensor = end.value
            return logits_RV
        except GeneratorExit:
            # Not here: a generator is closed by whoever forgets it, on any thread.
            self._device.post(lambda: self._tell(Order(OrderKind.DROP, step)))
            raise
        except Exception as error:
            self._lose(f"a step failed in the middle: {type(error).__name__}: {error}")
            raise
        finally:
            forward.close()

    def serve(self, timeout: float) -> None:
        """The start is over: from now on nobody may be behind by more than `timeout` seconds. On the device thread."""
        self._tell(Order(OrderKind.SERVE))
        self._orders.set_timeout(timeout)
        self._heart = threading.Thread(
            target=self._beat_on, args=(timeout / BEATS_PER_TIMEOUT,), name="rank-heartbeat", daemon=True
        )
        self._heart.start()

    def end(self) -> None:
        """Lets the followers end, after what they have begun. Returns when they have been told."""
        self._ending.set()
        self._device.call(self._tell, Order(OrderKind.END))

    def _beat_on(self, pause: float) -> None:
        while not self._ending.wait(pause):
            # Waits for its turn: while the thread computes, the step's own messages show that all are there.
            self._device.call(self._beat)

    def _beat(self) -> None:
        if self._ending.is_set():
            return
        self._tell(Order(OrderKind.BEAT))
        try:
            leaving_S = self._orders.host.collect(torch.zeros(1, dtype=torch.int64))
        except Exception as error:
            self._lose(f"a rank is lost: {error}")
            return
        assert leaving_S is not None
        if leaving_S.any() and not self._is_leaving:
            self._is_leaving = True
            logger.info("rank %d was asked to end: the worker does", int(leaving_S.flatten().argmax()))
            self._leave()

    def _tell(self, order: Order) -> None:
        try:
            self._orders.tell(order)
        except Exception as error:
            self._lose(f"a rank is lost: {error}")

    def _lose(self, reason: str) -> None:
        if not self._ending.is_set():
            self._ending.set()
            self._fail(reason)
