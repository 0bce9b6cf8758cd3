"""Traces by OpenTelemetry, for those who install it (extra `otel`) and say where they go.

Whatever is to be a span is written after it has ended, with the times it had. Without `--traces` nothing of
OpenTelemetry is imported.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from grokmoe.errors import ConfigError
from grokmoe.settings import setting

TRACE_KEYS = ("traceparent", "tracestate")
"""Metadata in which a caller says which trace a call belongs to (W3C Trace Context)."""

Attributes = Mapping[str, str | int | float]


@dataclasses.dataclass(frozen=True)
class TraceSettings:
    """Where traces go, and how many there are."""

    traces: str = setting(
        "", "where to send traces: an OTLP collector, such as http://collector:4317; empty: nowhere", metavar="URL"
    )
    trace_share: float = setting(
        0.01, "share of requests to trace, 0 to 1, of callers that have not decided it themselves"
    )

    def check_traces(self) -> None:
        """Raises ConfigError for what cannot be."""
        if not 0 <= self.trace_share <= 1:
            raise ConfigError(f"trace_share is {self.trace_share}, must be between 0 and 1")
        if self.traces and "://" not in self.traces:
            raise ConfigError(f"traces is {self.traces}, must be a URL such as http://collector:4317")


class Span:
    """A span that can have children. Times are those of time.monotonic()."""

    def __init__(self, tracer: Any, span: Any, epoch_ns: int) -> None:
        """epoch_ns: when time.monotonic() was 0, the same in all of a trace: clocks are set now and then."""
        from opentelemetry import trace

        self._tracer, self._span, self._epoch_ns = tracer, span, epoch_ns
        self._context = trace.set_span_in_context(span)

    def child(self, name: str, begin: float, end: float, attributes: Attributes | None = None, error: str = "") -> Span:
        """A part of it that has ended. error: what went wrong, if anything."""
        started = self._tracer.start_span(name, self._context, start_time=self._at(begin))
        span = Span(self._tracer, started, self._epoch_ns)
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
    """Begins traces, or goes on with those of callers."""

    def __init__(self, provider: Any) -> None:
        """provider: an OpenTelemetry TracerProvider; it samples."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._tracer = provider, provider.get_tracer("grokmoe")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def open(cls, settings: TraceSettings, service: str) -> Tracing | None:
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
        provider = TracerProvider(
            ParentBased(TraceIdRatioBased(settings.trace_share)), Resource.create({"service.name": service})
        )
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
        span = self._tracer.start_span(name, context, SpanKind.SERVER, start_time=epoch_ns + round(begin * 1e9))
        return Span(self._tracer, span, epoch_ns) if span.is_recording() else None

    def close(self) -> None:
        """Sends what has not been sent."""
        self._provider.shutdown()


def caller_metadata() -> dict[str, str]:
    """The current span of the program that calls, for `Client(address, metadata=caller_metadata)`.

    Needs OpenTelemetry's API only. Empty outside of a span.
    """
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier
