"""An OTLP collector on loopback that keeps every span it is sent."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


@dataclasses.dataclass(frozen=True)
class Span:
    """One span as it was sent. service, instance: of the process; times: nanoseconds since the epoch."""

    service: str
    instance: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    begin: int
    end: int
    attributes: dict[str, Any]
    error: str


class Collector:
    """url: what `--traces` takes."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    @property
    def spans(self) -> list[Span]:
        """All so far."""
        with self._lock:
            return list(self._spans)

    def named(self, name: str) -> list[Span]:
        """Those of a name, in the order of their beginnings."""
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.begin)

    def take(self, data: bytes) -> bytes:
        """One export."""
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        request = trace_service_pb2.ExportTraceServiceRequest.FromString(data)
        found = [
            _read(span, _values(group.resource.attributes))
            for group in request.resource_spans
            for scope in group.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans += found
        return b""  # an empty response


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


def _read(span: Any, resource: dict[str, Any]) -> Span:
    return Span(
        resource["service.name"],
        resource.get("service.instance.id", ""),
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _values(span.attributes),
        span.status.message,
    )


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """A running collector."""
    server = grpc.server(ThreadPoolExecutor(2))
    collector = Collector(server.add_insecure_port("127.0.0.1:0"))
    handler = grpc.unary_unary_rpc_method_handler(lambda data, context: collector.take(data))
    service, _, method = EXPORT[1:].rpartition("/")
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
    server.start()
    try:
        yield collector
    finally:
        server.stop(1).wait()
