"""A client's calls as spans of the program that makes them; the server's are their children (W3C Trace Context).

Only for clients that were given a tracer provider. Needs OpenTelemetry's API, which is imported by nobody else here.
"""

from __future__ import annotations

from typing import Any

from grokmoe.errors import ConfigError


class CallSpans:
    """Of one client."""

    def __init__(self, provider: Any) -> None:
        """provider: an OpenTelemetry TracerProvider. ConfigError: the API is not installed."""
        try:
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(f"tracer_provider: OpenTelemetry is not installed (extra otel): {error}") from error
        self._tracer = provider.get_tracer("grokmoe")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, request: Any) -> CallSpan:
        """A call begins, under the current span of whoever makes it. request: its message, which names it."""
        from opentelemetry import trace

        name = request.DESCRIPTOR.name.removesuffix("Request")
        span = self._tracer.start_span(f"grokmoe {name}", kind=trace.SpanKind.CLIENT)
        span.set_attribute("rpc.system", "grpc")
        span.set_attribute("rpc.method", name)
        metadata: dict[str, str] = {}
        self._propagator.inject(metadata, trace.set_span_in_context(span))
        return CallSpan(span, metadata)


class CallSpan:
    """One call, its attempts together. metadata: what goes with each."""

    def __init__(self, span: Any = None, metadata: dict[str, str] | None = None) -> None:
        """span: None where nothing is traced."""
        self.metadata = metadata or {}
        self._span = span

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits; empty where nothing is traced."""
        return "" if self._span is None else f"{self._span.get_span_context().trace_id:032x}"

    def attempt(self) -> None:
        """The call goes out, for the first time or again."""
        if self._span is not None:
            self._span.add_event("attempt")

    def end(self, error: BaseException | None = None) -> None:
        """It is over. The first end counts."""
        span, self._span = self._span, None
        if span is None:
            return
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR, str(error)))
        span.end()


UNTRACED = CallSpan()
