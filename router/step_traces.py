"""Requests as traces: what each waited for, every step it took part in, and who was slow in it.

    request
    +- queue      arrival to first step
    +- prefill    first step to first token
    +- decode     first token to last
    +- step       one for each that had a chunk of the request, with the seconds of its legs
       +- layer      of some steps: the worker that all waited for
          +- expert call   one for each worker that was asked, failed ones included

Spans are written after the fact, from times that are taken anyway. Workers have nothing to do with it: their answers
say how long rows waited and were computed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from contextvars import ContextVar

from grokmoe.tracing import Attributes, Span, Tracing
from router.experts.call_record import CallRecord, straggler
from router.generation import Generation
from router.legs import Legs
from router.step import Step

DETAILED_STEPS = 16
"""Of so many steps of a request one is written with its layers and expert calls: at 64 layers and 8 workers a step has
500 of them. The first, which computes the prompt, always is."""

Layers = list[tuple[int, Sequence[CallRecord]]]

_layers: ContextVar[Layers | None] = ContextVar("grokmoe_step_layers", default=None)


@dataclasses.dataclass
class _Live:
    """A request that is traced."""

    span: Span
    num_steps: int = 0


class StepTraces:
    """Of one router. Costs one look into a dictionary per step while no request is traced."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._live: dict[str, _Live] = {}

    def begin(self, generation: Generation) -> None:
        """A request was taken in."""
        span = self._tracing.begin("request", generation.call.trace_context, generation.arrived)
        if span is not None:
            self._live[generation.request.request_id] = _Live(span)

    def step_begins(self) -> None:
        """On the task that runs the step."""
        _layers.set([] if self._live else None)

    def layer_done(self, layer: int, calls: Sequence[CallRecord]) -> None:
        """See LayerHook."""
        layers = _layers.get()
        if layers is not None:
            layers.append((layer, tuple(calls)))

    def step_done(self, worker: str, step: Step, seconds: float, legs: Legs) -> None:
        """On the same task as `step_begins`. worker: address of the attention worker."""
        if not self._live:
            return
        end, layers = time.monotonic(), _layers.get() or []
        chunks = {chunk.sequence.request.request_id: chunk for chunk in step.chunks}
        for request_id, chunk in chunks.items():
            live = self._live.get(request_id)
            if live is None:
                continue
            span = live.span.child(
                "step",
                end - seconds,
                end,
                {
                    "attention_worker": worker,
                    "tokens": step.num_tokens,
                    "sequences": len(step.chunks),
                    "first_position": chunk.start,
                    **{f"leg.{leg}": spent for leg, spent in legs.seconds.items() if spent},
                },
            )
            if live.num_steps % DETAILED_STEPS == 0:
                _write_layers(span, layers)
            live.num_steps += 1

    def end(self, generation: Generation) -> None:
        """A request is over. Harmless for one that is not traced."""
        live = self._live.pop(generation.request.request_id, None)
        if live is None:
            return
        over = generation.ended_at or time.monotonic()
        scheduled, first = generation.scheduled_at, generation.first_token_at
        live.span.child("queue", generation.arrived, scheduled or over)
        if scheduled is not None:
            live.span.child("prefill", scheduled, first or over)
        if first is not None:
            live.span.child("decode", first, over)
        live.span.end(
            over,
            {
                "request_id": generation.request.request_id,
                "caller": generation.call.caller,
                "prompt_tokens": len(generation.request.prompt_ids),
                "output_tokens": sum(sequence.num_outputs for sequence in generation.sequences),
                "steps": live.num_steps,
            },
            generation.failure,
        )

    async def close(self) -> None:
        """Sends what has not been sent, on a thread of its own."""
        await asyncio.to_thread(self._tracing.close)


def _write_layers(step: Span, layers: Layers) -> None:
    for layer, calls in layers:
        if not calls:
            continue
        found = straggler(calls)
        waited: Attributes = {} if found is None else {"straggler": found[0].address, "straggler_seconds": found[1]}
        begin, end = min(call.begin for call in calls), max(call.end for call in calls)
        span = step.child("layer", begin, end, {"layer": layer, **waited})
        for call in calls:
            attributes: dict[str, str | int | float] = {"worker": call.address, "rows": call.num_rows}
            if not call.failure:
                attributes |= {"queue": call.queue, "compute": call.compute, "batch_rows": call.batch_rows}
            span.child("expert call", call.begin, call.end, attributes, call.failure)
