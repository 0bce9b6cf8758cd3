"""Calls of a gRPC server as metrics, under the names that dashboards for gRPC know (those of go-grpc-prometheus)."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, Counter, Histogram

CALL = ("grpc_type", "grpc_service", "grpc_method")

HANDLING_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

Labels = tuple[str, str, str]
"""Of `CALL`."""

_CODES: dict[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}


class CallMetrics(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Counts the calls of a server's own methods. Others, health and reflection among them, it does not look at: what a
    caller writes must not become a label."""

    def __init__(self, registry: CollectorRegistry, services: Mapping[str, Mapping[str, Any]]) -> None:
        """services: name -> its methods' handlers by name."""
        self._labels = {
            f"/{service}/{method}": (_type_of(handler), service, method)
            for service, handlers in services.items()
            for method, handler in handlers.items()
        }
        self._started = Counter("grpc_server_started_total", "Calls begun.", CALL, registry=registry)
        self._handled = Counter(
            "grpc_server_handled_total", "Calls ended, by status code.", (*CALL, "grpc_code"), registry=registry
        )
        self._received = Counter("grpc_server_msg_received_total", "Messages of callers.", CALL, registry=registry)
        self._sent = Counter("grpc_server_msg_sent_total", "Messages to callers.", CALL, registry=registry)
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "Begin of a call to its end, streams included.",
            CALL,
            buckets=HANDLING_BUCKETS,
            registry=registry,
        )

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler, labels = await continuation(details), self._labels.get(str(details.method))
        if handler is None or labels is None:
            return handler
        # The handler's own kind: one that refuses a call can be of another kind than the method.
        for kind in ("unary_unary", "unary_stream", "stream_stream"):
            behaviour = getattr(handler, kind)
            if behaviour is not None:
                is_generator = inspect.isasyncgenfunction(behaviour)
                returning = self._answering if kind == "unary_unary" else self._writing
                wrap = self._yielding if is_generator else returning
                make = getattr(grpc, f"{kind}_rpc_method_handler")
                return make(wrap(behaviour, labels), handler.request_deserializer, handler.response_serializer)
        return handler

    def _answering(self, behaviour: Callable[..., Any], labels: Labels) -> Callable[..., Any]:
        async def call(request: Any, context: Any) -> Any:
            with self._counted(labels, context):
                self._received.labels(*labels).inc()
                answer = await behaviour(request, context)
                self._sent.labels(*labels).inc()
                return answer

        return call

    def _writing(self, behaviour: Callable[..., Any], labels: Labels) -> Callable[..., Any]:
        """Of a handler that reads from the context, or is given one message, and writes to the context."""
        received, sent = self._received.labels(*labels), self._sent.labels(*labels)
        is_given = labels[0] == "server_stream"

        async def call(request: Any, context: Any) -> Any:
            with self._counted(labels, context):
                if is_given:
                    received.inc()
                return await behaviour(request, _CountedMessages(context, received.inc, sent.inc))

        return call

    def _yielding(self, behaviour: Callable[..., Any], labels: Labels) -> Callable[..., Any]:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            with self._counted(labels, context):
                self._received.labels(*labels).inc()
                async with contextlib.aclosing(behaviour(request, context)) as answers:
                    async for answer in answers:
                        yield answer
                        self._sent.labels(*labels).inc()

        return call

    @contextlib.contextmanager
    def _counted(self, labels: Labels, context: Any) -> Iterator[None]:
        begin, code = time.perf_counter(), grpc.StatusCode.UNKNOWN.name
        self._started.labels(*labels).inc()
        try:
            yield
            code = _name(context.code())
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED.name
            raise
        except grpc.aio.AbortError:
            code = _name(context.code())
            raise
        finally:
            self._handled.labels(*labels, code).inc()
            self._seconds.labels(*labels).observe(time.perf_counter() - begin)


class _CountedMessages:
    """A handler's context that counts what is read from it and written to it."""

    def __init__(self, context: Any, received: Callable[[], None], sent: Callable[[], None]) -> None:
        self._context, self._received, self._sent = context, received, sent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def read(self) -> Any:
        """See grpc.aio.ServicerContext."""
        message = await self._context.read()
        if message is not grpc.aio.EOF:  # type: ignore[attr-defined]
            self._received()
        return message

    async def write(self, message: Any) -> None:
        """See grpc.aio.ServicerContext."""
        await self._context.write(message)
        self._sent()


def _name(code: Any) -> str:
    """Of a status code, which gRPC gives as a number, as its own kind, or not at all if the call went well."""
    if isinstance(code, grpc.StatusCode):
        return code.name
    return _CODES.get(code or 0, grpc.StatusCode.UNKNOWN.name)


def _type_of(handler: Any) -> str:
    if handler.request_streaming:
        return "bidi_stream" if handler.response_streaming else "client_stream"
    return "server_stream" if handler.response_streaming else "unary"
