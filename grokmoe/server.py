"""The gRPC server of every role: health, reflection, metrics endpoint, the READY line, an orderly end.

A role's composition root builds its servicers and hands them to `run`. Nothing here knows what they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import prometheus_client
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from grokmoe.channel import SERVER_OPTIONS
from grokmoe.errors import ConfigError, GrokmoeError, InternalError, StartupError
from grokmoe.settings import setting
from grokmoe.status import to_status

logger = logging.getLogger(__name__)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


MAX_PORT = 65535


def check_port(name: str, port: int, least: int = 0) -> None:
    """Raises ConfigError for a number that is no port; gRPC itself would serve on its remainder."""
    if not least <= port <= MAX_PORT:
        raise ConfigError(f"{name} is {port}, must be between {least} and {MAX_PORT}")


LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Settings that every serving process has."""

    listen: str = setting("127.0.0.1:0", "address to serve on: host:port (port 0: any free one) or unix:/path")
    metrics_port: int = setting(0, "port of the Prometheus endpoint; 0: any free one, -1: none")
    metrics_host: str = setting("127.0.0.1", "host of the Prometheus endpoint")
    grace: float = setting(5.0, "seconds that running calls get to finish after SIGTERM")
    exit_on_stdin_eof: bool = setting(False, "end when standard input closes, so that no child outlives its parent")
    log_level: str = setting("info", "what is logged to standard error", choices=LOG_LEVELS)

    def __post_init__(self) -> None:
        check_port("metrics_port", self.metrics_port, -1)
        if not self.listen.startswith("unix:"):
            host, _, port = self.listen.rpartition(":")
            if not host or not port.isdigit() or int(port) > MAX_PORT:
                raise ConfigError(
                    f"listen is {self.listen}, must be unix:/path or host:port with a port up to {MAX_PORT}"
                )


@dataclasses.dataclass(frozen=True)
class Service:
    """One gRPC service of a role.

    name: full protobuf name, such as `grokmoe.v1.Expert`; it also names the service in health checks.
    handlers: method name -> handler.
    drain: called when the server begins to stop. Streams that would live as long as their caller must finish what they
        have begun and end; without it they keep the process for the whole grace period.
    """

    name: str
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]
    drain: Callable[[], None] = lambda: None


def log_to_stderr(level: str) -> None:
    """Sends the log to standard error; standard output carries the READY line only."""
    form = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
    logging.basicConfig(level=level.upper(), format=form, stream=sys.stderr)


def raw_stream(handler: Callable[..., Awaitable[None]]) -> Any:
    """A bidirectional stream of undecoded messages: the data plane decodes for itself (grokmoe.tensors)."""
    return grpc.stream_stream_rpc_method_handler(handler)


def unary(handler: Callable[..., Any], request: Any, response: Any) -> Any:
    """A unary call, its errors turned into gRPC statuses."""
    return grpc.unary_unary_rpc_method_handler(
        errors_to_status(handler), request.FromString, response.SerializeToString
    )


def server_stream(handler: Callable[..., Any], request: Any, response: Any) -> Any:
    """A call answered by a stream, its errors turned into gRPC statuses."""
    return grpc.unary_stream_rpc_method_handler(
        errors_to_status(handler), request.FromString, response.SerializeToString
    )


def _expected(error: Exception) -> GrokmoeError:
    if isinstance(error, GrokmoeError):
        return error
    logger.exception("unexpected error in a call", exc_info=error)
    return InternalError(f"unexpected {type(error).__name__}; the server's log has it")


def errors_to_status(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Ends a call with the status of the error its handler raised (grokmoe.errors). A bug is logged, not told."""
    if inspect.isasyncgenfunction(handler):

        @functools.wraps(handler)
        async def stream(*args: Any) -> AsyncIterator[Any]:
            try:
                # Closed here, not by the garbage collector: a caller that left must cost nothing more.
                async with contextlib.aclosing(handler(*args)) as responses:
                    async for response in responses:
                        yield response
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await _abort(args[-1], error)

        return stream

    @functools.wraps(handler)
    async def once(*args: Any) -> Any:
        try:
            return await handler(*args)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(args[-1], error)

    return once


async def _abort(context: Any, error: Exception) -> None:
    """Ends a call with an error's status, keeping the trailing metadata that its handler has set."""
    status = to_status(_expected(error))
    await context.abort_with_status(
        status._replace(trailing_metadata=(*context.trailing_metadata(), *status.trailing_metadata))
    )


class RoleServer:
    """A started server with health and reflection. Not ready until `set_ready`."""

    def __init__(self, services: Sequence[Service]) -> None:
        self._services = tuple(services)
        self._server = grpc.aio.server(options=list(SERVER_OPTIONS))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for service in services:
            handler = grpc.method_handlers_generic_handler(service.name, service.handlers)
            self._server.add_generic_rpc_handlers((handler,))
        names = [service.name for service in services]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        self.address = ""

    async def start(self, listen: str) -> str:
        """Binds and serves. Returns the address with the port that was chosen. StartupError if it cannot bind."""
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {listen}: {error}") from error
        self.address = listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"
        await self._health.set("", SERVING)
        for service in self._services:
            await self._health.set(service.name, NOT_SERVING)
        await self._server.start()
        return self.address

    async def set_ready(self, ready: bool) -> None:
        """Health of each service by name: readiness. Health of "": liveness, SERVING while the process runs."""
        for service in self._services:
            await self._health.set(service.name, SERVING if ready else NOT_SERVING)

    async def stop(self, grace: float) -> None:
        """Tells health watchers, refuses new calls, lets running ones finish for `grace` seconds."""
        await self._health.enter_graceful_shutdown()
        for service in self._services:
            service.drain()
        await self._server.stop(grace)


def start_metrics(settings: ServerSettings, registry: prometheus_client.CollectorRegistry) -> str | None:
    """Serves the registry over HTTP. Returns `host:port`, or None when the settings say there is no endpoint."""
    if settings.metrics_port < 0:
        return None
    try:
        httpd, _ = prometheus_client.start_http_server(settings.metrics_port, settings.metrics_host, registry)
    except OSError as error:
        where = f"{settings.metrics_host}:{settings.metrics_port}"
        raise StartupError(f"cannot serve metrics on {where}: {error}") from error
    return f"{settings.metrics_host}:{httpd.server_port}"


def stop_signal(exit_on_stdin_eof: bool = False) -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets, and on request the end of standard input."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if exit_on_stdin_eof:

        def watch() -> None:
            # Not sys.stdin: its lock, held by a thread that waits in a read, would abort the interpreter at exit.
            with contextlib.suppress(OSError):  # closed from the start: the parent is gone already
                while os.read(0, 4096):
                    pass
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending already
                loop.call_soon_threadsafe(stop.set)

        threading.Thread(target=watch, name="stdin-watch", daemon=True).start()
    return stop


async def run(
    settings: ServerSettings,
    services: Sequence[Service],
    registry: prometheus_client.CollectorRegistry,
    before_ready: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Serves until a signal comes. Prints `METRICS <address>` and `READY <address>` on standard output.

    before_ready: what must have happened before the services are ready; health answers meanwhile.
    """
    stop = stop_signal(settings.exit_on_stdin_eof)
    server = RoleServer(services)
    address = await server.start(settings.listen)
    try:
        metrics = start_metrics(settings, registry)
        if before_ready is not None:
            waiting = asyncio.ensure_future(before_ready())
            stopping = asyncio.ensure_future(stop.wait())
            await asyncio.wait((waiting, stopping), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not waiting.done():
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
                return
            await waiting
        await server.set_ready(True)
        if metrics:
            print(f"METRICS {metrics}", flush=True)  # noqa: T201 - read by whoever started this process
        print(f"READY {address}", flush=True)  # noqa: T201
        await stop.wait()
        logger.info("stopping")
    finally:
        await server.stop(settings.grace)
