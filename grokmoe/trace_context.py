"""Which traces the work of a task belongs to, from where that is decided to where messages are sent.

A step is computed for many requests at once, so it may belong to several traces. Streams between router and workers
live long; what one message belongs to travels in the message (W3C Trace Context, a `traceparent` for each trace).
Nothing here needs OpenTelemetry. Where nothing is traced it costs one look at a context variable per call.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from contextvars import ContextVar

MAX_TRACES = 4
"""Traces that one step is written to with all it sends: beyond it, messages and spans would be many times the work."""

_traces: ContextVar[tuple[str, ...]] = ContextVar("grokmoe_traces", default=())
_parents: ContextVar[tuple[str, ...]] = ContextVar("grokmoe_traceparents", default=())


def belong_to(trace_ids: Iterable[str]) -> None:
    """What this task does from now on belongs to these traces, each 32 hexadecimal digits; none: to no trace."""
    _traces.set(tuple(trace_ids))
    _parents.set(())


def new_span() -> int:
    """Draws the id of a span that is written later: the parent, in each trace, of what this task sends from now on.

    0: nothing is traced. The same id in several traces is not ambiguous, a span is named by both.
    """
    traces = _traces.get()
    if not traces:
        return 0
    span_id = random.getrandbits(64) or 1
    _parents.set(tuple(f"00-{trace_id}-{span_id:016x}-01" for trace_id in traces))
    return span_id


def traceparents() -> tuple[str, ...]:
    """What goes with a message that this task sends."""
    return _parents.get()
