"""What the log says of a request: all lines of its call name it and its trace, and one tells how it ended."""

from __future__ import annotations

import logging

from grokmoe.errors import Code
from grokmoe.logs import about, note
from grokmoe.tracing import trace_id_of
from router.engine import Engine
from router.generation import Generation

logger = logging.getLogger(__name__)

FAILURES = frozenset(code.name for code in (Code.INTERNAL, Code.UNAVAILABLE, Code.UNKNOWN))
"""Ends of which the service is the cause; these are always told."""


class RequestLog:
    """One service's."""

    def __init__(self, engine: Engine, tells_all: bool = False) -> None:
        """tells_all: also of requests that ended well, or by their callers' doing."""
        self._engine, self._tells_all = engine, tells_all

    def begun(self, generation: Generation) -> None:
        """On the task of its call."""
        note(request_id=generation.request.request_id, trace_id=self._trace_id(generation))

    def ended(self, generation: Generation, outcome: str) -> None:
        """On the same task, with the engine not having forgotten the request. outcome: as the metrics say it."""
        has_failed = outcome in FAILURES
        if not (has_failed or self._tells_all):
            return
        arrived, scheduled, first, over = (
            generation.arrived,
            generation.scheduled_at,
            generation.first_token_at,
            generation.ended_at,
        )
        seconds = {
            "queue_seconds": scheduled and scheduled - arrived,
            "first_token_seconds": first and first - arrived,
            "seconds": over and over - arrived,
        }
        fields = about(
            outcome=outcome,
            caller=generation.call.caller,
            prompt_tokens=len(generation.request.prompt_ids),
            output_tokens=sum(sequence.num_outputs for sequence in generation.sequences),
            **{name: round(value, 6) for name, value in seconds.items() if value is not None},
        )
        why = f": {generation.failure}" if generation.failure else ""
        logger.log(logging.WARNING if has_failed else logging.INFO, "request ended%s", why, extra=fields)

    def _trace_id(self, generation: Generation) -> str:
        """As the router traces it; else as its caller does, who may have traced it and not wanted us to."""
        traces = self._engine.traces
        ours = "" if traces is None else traces.trace_id(generation.request.request_id)
        return ours or trace_id_of(dict(generation.call.trace_context).get("traceparent", ""))
