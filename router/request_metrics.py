"""What a request adds to the router's metrics."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import Counter

from grokmoe.telemetry import RouterMetrics
from router.experts.call_record import CallRecord, straggler
from router.generation import Generation


def observe_end(metrics: RouterMetrics, generation: Generation) -> None:
    """A request is over, however it ended. What it has not come to is not counted."""
    arrived, scheduled, first, ended = (
        generation.arrived,
        generation.scheduled_at,
        generation.first_token_at,
        generation.ended_at,
    )
    metrics.prompt_length.observe(len(generation.request.prompt_ids))
    if scheduled is None:
        return
    metrics.queue_time.observe(scheduled - arrived)
    if first is None:
        return
    metrics.time_to_first_token.observe(first - arrived)
    metrics.prefill_time.observe(first - scheduled)
    outputs = [sequence.num_outputs for sequence in generation.sequences]
    metrics.output_length.observe(sum(outputs))
    if ended is None:
        return
    metrics.request_time.observe(ended - arrived)
    num_later = max(outputs) - 1
    if num_later > 0:
        metrics.decode_time.observe(ended - first)
        metrics.time_per_output_token.observe((ended - first) / num_later)


class StragglerTime:
    """A LayerHook: who layers wait for, as seconds per expert worker."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metric = metrics.straggler_time
        self._by_worker: dict[int, Counter] = {}

    def __call__(self, layer: int, calls: Sequence[CallRecord]) -> None:
        found = straggler(calls)
        if found is None:
            return
        call, seconds = found
        counter = self._by_worker.get(call.worker)
        if counter is None:  # kept: finding a metric by its labels costs more than counting
            counter = self._by_worker[call.worker] = self._metric.labels(str(call.worker))
        counter.inc(seconds)
