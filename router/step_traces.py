"""Requests as traces: what each waited for, every step it took part in, and who was slow in it.

    request
    +- queue      arrival to first step
    +- prefill    first step to first token
    +- decode     first token to last
    +- step       one for each that had a chunk of the request, with the seconds of its legs; failed ones included
       +- attention step   of some steps: what the attention worker itself writes, layer by layer
       +- layer            of the same steps: the worker that all waited for
          +- expert call      one for each worker that was asked, failed ones included
             +- expert worker    what that worker itself writes: waiting, and the grouped GEMM it took part in

Spans are written after the fact, from times that are taken anyway. Their ids are drawn before, for the plan and the
calls to name them (grokmoe/trace_context.py): workers that were given `--traces` write what is below them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterable, Sequence
from contextvars import ContextVar

from grokmoe.trace_context import MAX_TRACES, belong_to, new_span, traceparents
from grokmoe.tracing import Attributes, Span, Tracing
from router.experts.call_record import CallRecord, straggler
from router.generation import Generation
from router.legs import Legs
from router.step import Chunk, Step

DETAILED_STEPS = 16
"""Of so many steps of a request one is written with its layers and expert calls: at 64 layers and 8 workers a step has
500 of them. The first, which computes the prompt, always is."""


@dataclasses.dataclass(eq=False)
class _Live:
    """A request that is traced."""

    span: Span
    num_steps: int = 0


@dataclasses.dataclass(frozen=True)
class _Details:
    """Of one step: whose traces get its layers, by which id workers know it, and the layers so far."""

    of: tuple[_Live, ...]
    span_id: int
    layers: list[tuple[int, Sequence[CallRecord]]]


_details: ContextVar[_Details | None] = ContextVar("grokmoe_step_details", default=None)


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

    def trace_id(self, request_id: str) -> str:
        """Of a request that is traced; empty: it is not."""
        live = self._live.get(request_id)
        return "" if live is None else live.span.trace_id

    def step_begins(self, step: Step) -> tuple[str, ...]:
        """On the task that runs the step. Returns the traceparents of its plan."""
        detailed = [live for live, _ in self._traced(step) if live.num_steps % DETAILED_STEPS == 0][:MAX_TRACES]
        belong_to(live.span.trace_id for live in detailed)
        _details.set(_Details(tuple(detailed), new_span(), []) if detailed else None)
        return traceparents()

    def _traced(self, step: Step) -> Iterable[tuple[_Live, Chunk]]:
        """Requests of a step that are traced, each once."""
        if not self._live:
            return ()
        chunks = {chunk.sequence.request.request_id: chunk for chunk in step.chunks}
        return [(self._live[name], chunk) for name, chunk in chunks.items() if name in self._live]

    def layer_done(self, layer: int, calls: Sequence[CallRecord]) -> None:
        """See LayerHook."""
        details = _details.get()
        if details is not None:
            details.layers.append((layer, tuple(calls)))

    def step_done(self, worker: str, step: Step, seconds: float, legs: Legs) -> None:
        """On the same task as `step_begins`. worker: address of the attention worker."""
        spent = {f"leg.{leg}": spent for leg, spent in legs.seconds.items() if spent}
        self._write(worker, step, seconds, spent, "")

    def step_failed(self, worker: str, step: Step, seconds: float, error: str) -> None:
        """The same for a step without a result. A request that ended with it is not there any more."""
        self._write(worker, step, seconds, {}, error)

    def _write(self, worker: str, step: Step, seconds: float, more: Attributes, error: str) -> None:
        end, details = time.monotonic(), _details.get()
        for live, chunk in self._traced(step):
            attributes: Attributes = {
                "attention_worker": worker,
                "tokens": step.num_tokens,
                "sequences": len(step.chunks),
                "first_position": chunk.start,
                **more,
            }
            is_detailed = details is not None and live in details.of
            span_id = details.span_id if details is not None and is_detailed else 0
            span = live.span.child("step", end - seconds, end, attributes, error, span_id)
            if details is not None and is_detailed:
                _write_layers(span, details.layers)
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


def _write_layers(step: Span, layers: Iterable[tuple[int, Sequence[CallRecord]]]) -> None:
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
            span.child("expert call", call.begin, call.end, attributes, call.failure, call.span_id)
