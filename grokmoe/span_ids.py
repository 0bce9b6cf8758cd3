"""Ids of spans, some of them chosen: a span's children are in other processes before it is written here.

Imported by grokmoe.tracing once there is something to trace: OpenTelemetry must be installed.
"""

from __future__ import annotations

from opentelemetry.sdk.trace.id_generator import RandomIdGenerator


class SpanIds(RandomIdGenerator):
    """chosen: the id of the next span; 0: any. Used by one thread."""

    chosen = 0

    def generate_span_id(self) -> int:
        """See IdGenerator."""
        chosen, self.chosen = self.chosen, 0
        return chosen or int(super().generate_span_id())
