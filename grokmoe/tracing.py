"""Traces by OpenTelemetry, for those who install it (extra `otel`) and say where they go.

Whatever is to be a span is written after it has ended, with the times it had. Without `--traces` nothing of
OpenTelemetry is imported.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grokmoe.errors import ConfigError
from grokmoe.settings import setting
from grokmoe.trace_context import MAX_TRACES

TRACE_KEYS = ("traceparent", "tracestate")
"""Metadata in which a caller says which trace a call belongs to (W3C Trace Context)."""

Attributes = Mapping[str, str | int | float]

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """Where traces go. Of a worker: those that routers have begun."""

    traces: str = setting(
        "", "where to send traces: an OTLP collector, such as http://collector:4317; empty: nowhere", metavar="URL"
    )

    def check_traces(self) -> None:
        """Raises ConfigError for what cannot be."""
        if self.traces and "://" not in self.traces:
            raise ConfigError(f"traces is {self.traces}, must be a URL such as http://collector:4317")

    @property
    def share_begun(self) -> float:
        """Share of what has no caller's trace that a trace is begun for."""
        return 0.0


@dataclasses.dataclass(frozen=True)
class TraceSettings(ExportSettings):
    """Where traces go, and how many there are."""

    trace_share: float = setting(
        0.01, "share of requests to trace, 0 to 1, of callers that have not decided it themselves"
    )

    def check_traces(self) -> None:
        """Raises ConfigError for what cannot be."""
        super().check_traces()
        if not 0 <= self.trace_share <= 1:
            raise ConfigError(f"trace_share is {self.trace_share}, must be between 0 and 1")

    @property
    def share_begun(self) -> float:
        """See ExportSettings."""
        return self.trace_share


class Span:
    """A span that can have children. Times are those of time.monotonic()."""

    def __init__(self, tracing: Tracing, span: Any, epoch_ns: int) -> None:
        """epoch_ns: when time.monotonic() was 0, the same in all of a trace: clocks are set now and then."""
        from opentelemetry import trace

        self._tracing, self._span, self._epoch_ns = tracing, span, epoch_ns
        self._context = trace.set_span_in_context(span)

    @property
    def trace_id(self) -> str:
        """Of the trace it is part of, 32 hexadecimal digits."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def child(
        self,
        name: str,
        begin: float,
        end: float,
        attributes: Attributes | None = None,
        error: str = "",
        span_id: int = 0,
    ) -> Span:
        """A part of it that has ended. error: what went wrong, if anything. span_id: what others know it by; 0: any."""
        started = self._tracing.start(name, self._context, self._at(begin), span_id)
        span = Span(self._tracing, started, self._epoch_ns)
        span.end(end, attributes, error)
        return span

    def end(self, end: float, attributes: Attributes | None = None, error: str = "") -> None:
        """It has ended."""
        from opentelemetry.trace import Status, StatusCode

        for key, value in (attributes or {}).items():
            self._span.set_attribute(f"grokmoe.{key}", value)
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(self._at(end))

    def _at(self, seconds: float) -> int:
        return self._epoch_ns + round(seconds * 1e9)


class Tracing:
    """Begins traces, or goes on with those of callers. For one thread."""

    def __init__(self, provider: Any) -> None:
        """provider: an OpenTelemetry TracerProvider; it samples."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        from grokmoe.span_ids import SpanIds

        self._ids = provider.id_generator = SpanIds()
        self.provider, self._tracer = provider, provider.get_tracer("grokmoe")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def open(cls, settings: ExportSettings, service: str) -> Tracing | None:
        """Sends spans in the background; None: the settings say nowhere. ConfigError: OpenTelemetry is not installed.

        service: which part of the system says it.
        """
        if not settings.traces:
            return None
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        except ImportError as error:
            raise ConfigError(f"traces: OpenTelemetry is not installed (extra otel): {error}") from error
        about = {"service.name": service, "service.instance.id": f"{socket.gethostname()}-{os.getpid()}"}
        provider = TracerProvider(ParentBased(TraceIdRatioBased(settings.share_begun)), Resource.create(about))
        exporter = OTLPSpanExporter(settings.traces, insecure=settings.traces.startswith("http://"))
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def begin(self, name: str, caller: Sequence[tuple[str, str]], begin: float) -> Span | None:
        """A call's span, under its caller's if that has one; None: it is not to be traced.

        caller: metadata, those of `TRACE_KEYS`.
        """
        from opentelemetry.trace import SpanKind

        context = self._propagator.extract(dict(caller))
        epoch_ns = time.time_ns() - time.monotonic_ns()
        span = self.start(name, context, epoch_ns + round(begin * 1e9), kind=SpanKind.SERVER)
        return Span(self, span, epoch_ns) if span.is_recording() else None

    def under(self, traceparents: Sequence[str], name: str, begin: float) -> Iterator[Span]:
        """A span under each of these parents, see grokmoe/trace_context.py. What is no parent gets none."""
        for traceparent in traceparents[:MAX_TRACES]:
            if trace_id_of(traceparent):
                span = self.begin(name, [("traceparent", traceparent)], begin)
                if span is not None:
                    yield span

    def start(self, name: str, context: Any, at_ns: int, span_id: int = 0, kind: Any = None) -> Any:
        """A span of OpenTelemetry's own. span_id: see Span.child."""
        from opentelemetry.trace import SpanKind

        self._ids.chosen = span_id
        return self._tracer.start_span(name, context, kind or SpanKind.INTERNAL, start_time=at_ns)

    def close(self) -> None:
        """Sends what has not been sent."""
        self.provider.shutdown()


def trace_id_of(traceparent: str) -> str:
    """The trace that a `traceparent` names, 32 hexadecimal digits; empty: it is none."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return found[1] if found and found[1].strip("0") else ""


def caller_metadata() -> dict[str, str]:
    """The current span of the program that calls, for `Client(address, metadata=caller_metadata)`.

    Needs OpenTelemetry's API only. Empty outside of a span.
    """
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier
