"""The queue before the device: whatever waits for one layer when the device becomes free is one grouped GEMM."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from expert_worker.experts import ExpertCall, ExpertSet
from expert_worker.joining import RowsByExpert, join
from expert_worker.layer import CountedLayer, Layer
from grokmoe.device_thread import DeviceThread
from grokmoe.expert_units import FIRST_SLICE, describe_unit
from grokmoe.recording import current
from grokmoe.telemetry import ExpertMetrics


class ExpertResult(NamedTuple):
    """Output rows of one call, and what they cost.

    queue_ns: from submission to the start of the computation. compute_ns, batch_rows, batch_calls: time, rows and calls
    of the grouped GEMM the call took part in, those of other callers included.
    """

    rows_ND: torch.Tensor
    queue_ns: int
    compute_ns: int
    batch_rows: int
    batch_calls: int = 1


@dataclasses.dataclass(eq=False, slots=True)
class _Call:
    weights: Layer
    rows: RowsByExpert
    future: asyncio.Future[ExpertResult]
    received_ns: int
    caller: str

    def joins(self, other: _Call) -> bool:
        """Whether both are computed with the same weights, from rows in the same memory."""
        return self.weights is other.weights and self.rows.rows_ND.device == other.rows.rows_ND.device


class ExpertEngine:
    """Computes calls on the device thread, joining those that wait.

    There is no waiting window: a call that finds the device idle begins at once, and calls that arrive while it is
    busy are joined when it becomes free. The oldest call is always in the next batch, so none starves.

    A call is computed with the weights it was checked against, and only calls with the same are joined: experts may
    come and go in between.
    """

    def __init__(
        self, experts: ExpertSet, metrics: ExpertMetrics, device: DeviceThread, max_batch_rows: int = 16384
    ) -> None:
        self.experts = experts
        self._metrics = metrics
        self._device = device
        self._max_batch_rows = max_batch_rows
        self._waiting: deque[_Call] = deque()
        self._lock = threading.Lock()
        self._rows_of = functools.cache(lambda unit: metrics.rows.labels(_name_of(unit)))
        metrics.queue.set_function(lambda: len(self._waiting))

    def forward(
        self, layer: int, expert_ids: Sequence[int], counts: Sequence[int], rows_ND: torch.Tensor
    ) -> ExpertResult:
        """Computes one call on the caller's thread, for a process that has the experts on board."""
        began = time.monotonic_ns()
        out_ND = self.experts.forward(layer, expert_ids, counts, rows_ND)
        compute_ns = time.monotonic_ns() - began
        self._observe(1, RowsByExpert(expert_ids, counts, rows_ND), compute_ns)
        return ExpertResult(out_ND, 0, compute_ns, len(rows_ND))

    @property
    def can_be_recorded(self) -> bool:
        """Whether `record` can be used, now and later: the experts of a process that has them on board stay."""
        return all(isinstance(weights, CountedLayer) for weights in self.experts.layers)

    def record(self, layer: int, counts_E: torch.Tensor, rows_ND: torch.Tensor) -> torch.Tensor:
        """The same while loops are recorded. All experts of the layer must be held.

        counts_E: rows of every expert, int64, read when the loops run. Returns rows_ND, new.
        """
        recording, weights = current(), self.experts.layers[layer]
        assert recording is not None
        assert isinstance(weights, CountedLayer)
        out_ND = weights.forward_counted(rows_ND, counts_E)
        num_layers = self.experts.config.num_layers

        def observe(spent_ns: dict[str, int]) -> None:
            rows = RowsByExpert(weights.expert_ids, counts_E.tolist(), rows_ND)
            self._observe(1, rows, spent_ns.get("expert", 0) // num_layers)  # a layer's own is not known

        recording.after.append(observe)
        return out_ND

    def submit(self, call: ExpertCall, caller: str = "") -> asyncio.Future[ExpertResult]:
        """Queues one call. The future belongs to the running event loop; cancel it to drop a call not yet begun.

        caller: who waits for it, for metrics.
        """
        future: asyncio.Future[ExpertResult] = asyncio.get_running_loop().create_future()
        waiting = _Call(call.weights, call.rows, future, time.monotonic_ns(), caller)
        with self._lock:
            self._waiting.append(waiting)
        self._device.post(self._compute_next)
        return future

    def _take(self) -> list[_Call]:
        """Removes the oldest call and those of its weights that fit beside it; drops what was cancelled."""
        with self._lock:
            alive = [call for call in self._waiting if not call.future.cancelled()]
            batch, left = alive[:1], deque[_Call]()
            num_rows = len(batch[0].rows.rows_ND) if batch else 0
            for call in alive[1:]:
                size = len(call.rows.rows_ND)
                if call.joins(batch[0]) and num_rows + size <= self._max_batch_rows:
                    batch.append(call)
                    num_rows += size
                else:
                    left.append(call)
            self._waiting = left
        return batch

    def _compute_next(self) -> None:
        """One batch, on the device thread. Posted once per call, so a call that was joined leaves an idle turn."""
        batch = self._take()
        if not batch:
            return
        began = time.monotonic_ns()
        try:
            joined = join([call.rows for call in batch])
            rows = joined.rows
            out_ND = batch[0].weights.forward(rows.expert_ids, rows.counts, rows.rows_ND)
            outs_ND = joined.split(out_ND)
            if out_ND.is_cuda:
                torch.cuda.current_stream(out_ND.device).synchronize()  # an answer that is announced is there
        except BaseException as error:  # whatever it is, somebody waits for it, and the thread must live
            for call in batch:
                _hand_over(call.future, error)
            return
        compute_ns = time.monotonic_ns() - began
        for call, call_out_ND in zip(batch, outs_ND, strict=True):
            queue_ns = began - call.received_ns
            _hand_over(call.future, ExpertResult(call_out_ND, queue_ns, compute_ns, len(out_ND), len(batch)))
        for call in batch:
            self._metrics.queue_time.observe((began - call.received_ns) / 1e9)
        self._metrics.batch_callers.observe(len({call.caller for call in batch}))
        self._observe(len(batch), rows, compute_ns)

    def _observe(self, num_calls: int, rows: RowsByExpert, compute_ns: int) -> None:
        metrics = self._metrics
        metrics.batch_calls.observe(num_calls)
        metrics.batch_rows.observe(len(rows.rows_ND))
        metrics.compute_time.observe(compute_ns / 1e9)
        for unit, count in zip(rows.expert_ids, rows.counts, strict=True):
            if count:
                self._rows_of(unit).inc(count)


def _name_of(unit: int) -> str:
    return str(unit) if unit < FIRST_SLICE else describe_unit(unit)


def _hand_over(future: asyncio.Future[ExpertResult], outcome: ExpertResult | BaseException) -> None:
    """From the device thread to the future's event loop."""
    try:
        future.get_loop().call_soon_threadsafe(_settle, future, outcome)
    except RuntimeError:  # the loop is closed: nobody waits any more
        return


def _settle(future: asyncio.Future[ExpertResult], outcome: ExpertResult | BaseException) -> None:
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
