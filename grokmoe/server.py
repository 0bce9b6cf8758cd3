"""The gRPC server of every role: who may call, health, reflection, metrics endpoint, the READY line, an orderly end.

A role's composition root builds its servicers and hands them to `run`. Nothing here knows what they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import inspect
import logging
import os
import resource
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import grpc
import prometheus_client
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from grokmoe.access import Scope
from grokmoe.authentication import Authentication, ending_with
from grokmoe.call_metrics import CallMetrics
from grokmoe.channel import CLIENT_FACING_OPTIONS, KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS, SERVER_OPTIONS
from grokmoe.errors import ConfigError, GrokmoeError, InternalError, InvalidRequest, Reason, StartupError
from grokmoe.local_streams import SUFFIX, LocalServer
from grokmoe.logs import LogSettings
from grokmoe.loop_lag import watch_lag
from grokmoe.metrics_http import Page, start_http
from grokmoe.security import SecuritySettings
from grokmoe.settings import setting
from grokmoe.status import to_status
from grokmoe.telemetry import LoopMetrics

logger = logging.getLogger(__name__)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

HEALTH_TIMEOUT = 1.0
"""Seconds that health watchers have to take a change. One that takes nothing must not hold up others, or our end."""

MAX_IDLE_MS = 600_000
"""A client's connection without a call for this long is closed. The next call opens another and does not notice."""

CONNECTION_OPTIONS: tuple[tuple[str, int], ...] = (
    # Who has vanished without a word answers no probe; gRPC itself would wait for it, and compute for it, for hours.
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    # Either alone would be enough by its description; with the first alone this gRPC waits a minute and longer.
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
)
CLIENT_CONNECTION_OPTIONS: tuple[tuple[str, int], ...] = (("grpc.max_connection_idle_ms", MAX_IDLE_MS),)


def max_connections() -> int:
    """Most connections at a time on one address: half of the descriptors that the process may have.

    The others are for files, workers, probes. More connections are closed as soon as they come.
    """
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


MAX_PORT = 65535


def check_port(name: str, port: int, least: int = 0) -> None:
    """Raises ConfigError for a number that is no port; gRPC itself would serve on its remainder."""
    if not least <= port <= MAX_PORT:
        raise ConfigError(f"{name} is {port}, must be between {least} and {MAX_PORT}")


def check_listen(name: str, address: str) -> None:
    """Raises ConfigError for what is neither host:port nor unix:/path."""
    if not address.startswith("unix:"):
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or int(port) > MAX_PORT:
            raise ConfigError(f"{name} is {address}, must be unix:/path or host:port with a port up to {MAX_PORT}")


@dataclasses.dataclass(frozen=True)
class ServerSettings(SecuritySettings, LogSettings):
    """Settings that every serving process has."""

    listen: str = setting("127.0.0.1:0", "address to serve on: host:port (port 0: any free one) or unix:/path")
    metrics_port: int = setting(0, "port of the Prometheus endpoint; 0: any free one, -1: none")
    metrics_host: str = setting("127.0.0.1", "host of the Prometheus endpoint")
    grace: float = setting(5.0, "seconds that running calls get to finish after SIGTERM")
    exit_on_stdin_eof: bool = setting(False, "end when standard input closes, so that no child outlives its parent")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_port("metrics_port", self.metrics_port, -1)
        check_listen("listen", self.listen)
        if self.health_listen:
            check_listen("health_listen", self.health_listen)


@dataclasses.dataclass(frozen=True)
class Service:
    """One gRPC service of a role.

    name: full protobuf name, such as `grokmoe.v1.Expert`; it also names the service in health checks.
    handlers: method name -> handler.
    drain: called when the server begins to stop. Streams that would live as long as their caller must finish what they
        have begun and end; without it they keep the process for the whole grace period.
    scope: what a token must be good for to call it, where tokens are asked for.
    method_scopes: method name -> the scope of a method that has another.
    admit: called with a method's name after the token has been looked at and before the message is read; raises the
        GrokmoeError that the call ends with. Under overload it is all that most calls get, so it must be quick.
    """

    name: str
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]
    drain: Callable[[], None] = lambda: None
    scope: Scope = Scope.INFERENCE
    method_scopes: Mapping[str, Scope] = dataclasses.field(default_factory=dict)
    admit: Callable[[str], None] = lambda name: None

    @property
    def scopes(self) -> dict[str, Scope]:
        """As grokmoe.authentication takes them."""
        return {self.name: self.scope} | {f"/{self.name}/{name}": scope for name, scope in self.method_scopes.items()}


def raw_stream(handler: Callable[..., Awaitable[None]]) -> Any:
    """A bidirectional stream of undecoded messages: the data plane decodes for itself (grokmoe.tensors)."""
    return grpc.stream_stream_rpc_method_handler(handler)


def unary(handler: Callable[..., Any], request: Any, response: Any) -> Any:
    """A unary call, its errors turned into gRPC statuses; also those of a request that is no such message."""
    return grpc.unary_unary_rpc_method_handler(
        errors_to_status(handler, request), response_serializer=response.SerializeToString
    )


def server_stream(handler: Callable[..., Any], request: Any, response: Any) -> Any:
    """A call answered by a stream, its errors turned into gRPC statuses, as `unary` does."""
    return grpc.unary_stream_rpc_method_handler(
        errors_to_status(handler, request), response_serializer=response.SerializeToString
    )


def written_stream(handler: Callable[..., Awaitable[None]], request: Any) -> Any:
    """The same for a handler that writes its messages to the context itself, as bytes, and returns after the last."""
    return grpc.unary_stream_rpc_method_handler(errors_to_status(handler, request))


def _decoded(kind: Any, data: bytes) -> Any:
    """gRPC's own decoding would answer bytes that are no message with INTERNAL, or with nothing."""
    try:
        return kind.FromString(data)
    except DecodeError:
        message = f"not a {kind.DESCRIPTOR.full_name}"
        raise InvalidRequest("", message, reason=Reason.MALFORMED_MESSAGE) from None


def _expected(error: Exception) -> GrokmoeError:
    if isinstance(error, GrokmoeError):
        return error
    logger.exception("unexpected error in a call", exc_info=error)
    return InternalError(f"unexpected {type(error).__name__}; the server's log has it")


def errors_to_status(handler: Callable[..., Any], kind: Any) -> Callable[..., Any]:
    """Ends a call with the status of the error its handler raised (grokmoe.errors). A bug is logged, not told.

    kind: type of the request message, which the handler gets decoded.
    """
    if inspect.isasyncgenfunction(handler):

        @functools.wraps(handler)
        async def stream(data: bytes, context: Any) -> AsyncIterator[Any]:
            try:
                # Closed here, not by the garbage collector: a caller that left must cost nothing more.
                async with contextlib.aclosing(handler(_decoded(kind, data), context)) as responses:
                    async for response in responses:
                        yield response
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await _abort(context, error)

        return stream

    @functools.wraps(handler)
    async def once(data: bytes, context: Any) -> Any:
        try:
            return await handler(_decoded(kind, data), context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, error)

    return once


async def _abort(context: Any, error: Exception) -> None:
    """Ends a call with an error's status, keeping the trailing metadata that its handler has set."""
    status = to_status(_expected(error))
    await context.abort_with_status(
        status._replace(trailing_metadata=(*context.trailing_metadata(), *status.trailing_metadata))
    )


class _ServiceHandlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Finds the handler of a call to one service, or one that refuses it."""

    def __init__(self, service: Service) -> None:
        self._admit = service.admit
        self._methods = {f"/{service.name}/{name}": (name, handler) for name, handler in service.handlers.items()}

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """See grpc.GenericRpcHandler."""
        name, handler = self._methods.get(str(details.method), ("", None))
        if handler is None:
            return None
        try:
            self._admit(name)
        except Exception as error:
            return ending_with(_expected(error))
        return handler


def _health_handler(servicer: Any) -> Any:
    """The servicer of grpcio-health-checking, with our decoding."""
    request, response = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
    handlers = {
        "Check": unary(servicer.Check, request, response),
        "Watch": server_stream(servicer.Watch, request, response),
    }
    return grpc.method_handlers_generic_handler(health.SERVICE_NAME, handlers)


def _reflection_handler(names: Sequence[str]) -> Any:
    """The servicer of grpcio-reflection. names: of the services it tells of."""

    def decode(data: bytes) -> Any:
        try:
            return reflection_pb2.ServerReflectionRequest.FromString(data)
        except DecodeError:
            return reflection_pb2.ServerReflectionRequest()  # asks for nothing, which it answers as invalid

    servicer = reflection.aio.ReflectionServicer(names)  # type: ignore[attr-defined]
    info = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo, decode, reflection_pb2.ServerReflectionResponse.SerializeToString
    )
    return grpc.method_handlers_generic_handler(reflection.SERVICE_NAME, {"ServerReflectionInfo": info})


class RoleServer:
    """A started server with health and reflection. Not ready until `set_ready`."""

    def __init__(
        self,
        services: Sequence[Service],
        security: SecuritySettings | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = (),
        refused: Callable[[str], None] = lambda code: None,
    ) -> None:
        """security: who may call; None: everyone, in the clear. Raises ConfigError.

        interceptors: come before the one that looks at tokens, so that they see refused calls, too: traces, counters.
        refused: see grokmoe.authentication.
        """
        self._services = tuple(services)
        self._security = security or SecuritySettings()
        is_client_facing = not any(service.scope is Scope.CLUSTER for service in services)
        authentication = self._authentication(refused)
        self._server = grpc.aio.server(
            options=_options(is_client_facing, self._security.channel_options(is_client_facing)),
            interceptors=[*interceptors, *authentication],
        )
        self._local = LocalServer(_raw_streams(services), *(each.prove for each in authentication))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        handlers: list[Any] = [_health_handler(self._health), *map(_ServiceHandlers, services)]
        if self._security.reflection != "off":
            names = [service.name for service in services]
            handlers.append(_reflection_handler([*names, health.SERVICE_NAME, reflection.SERVICE_NAME]))
        self._server.add_generic_rpc_handlers(handlers)
        self._health_server: grpc.aio.Server | None = None
        self.address = self.health_address = ""

    def _authentication(self, refused: Callable[[str], None]) -> list[Authentication]:
        access = self._security.access()
        if access is None:
            return []
        scopes = {name: scope for service in self._services for name, scope in service.scopes.items()}
        exempt = [health.SERVICE_NAME]
        if self._security.reflection == "open":
            exempt.append(reflection.SERVICE_NAME)
        return [Authentication(access, scopes, exempt, refused)]

    async def start(self, listen: str) -> str:
        """Binds and serves. Returns the address with the port that was chosen. StartupError if it cannot bind."""
        credentials = self._security.credentials()
        self.address = _bind(self._server, listen, credentials)
        if self._local.has_streams and listen.startswith("unix:") and credentials is None:
            await self._local.start(listen.removeprefix("unix:") + SUFFIX)
        if self._security.health_listen:
            self._health_server = grpc.aio.server(options=_options(is_client_facing=True))
            self._health_server.add_generic_rpc_handlers((_health_handler(self._health),))
            self.health_address = _bind(self._health_server, self._security.health_listen)
        await self._health.set("", SERVING)
        for service in self._services:
            await self._health.set(service.name, NOT_SERVING)
        await self._server.start()
        if self._health_server is not None:
            await self._health_server.start()
        self._security.warn(self.address)
        return self.address

    async def set_ready(self, ready: bool) -> None:
        """Health of each service by name: readiness. Health of "": liveness, SERVING while the process runs."""
        for service in self._services:
            await _in_time(self._health.set(service.name, SERVING if ready else NOT_SERVING))

    async def stop(self, grace: float) -> None:
        """Tells health watchers, refuses new calls, lets running ones finish for `grace` seconds."""
        await _in_time(self._health.enter_graceful_shutdown())
        for service in self._services:
            service.drain()
        await asyncio.gather(self._server.stop(grace), self._local.stop(grace))
        if self._health_server is not None:  # last: probes are answered to the end
            await self._health_server.stop(0)


def _raw_streams(services: Iterable[Service]) -> dict[str, Any]:
    """What routers call of workers for every layer: `/service/method` -> handler."""
    return {
        f"/{service.name}/{name}": method.stream_stream
        for service in services
        if service.scope is Scope.CLUSTER
        for name, method in service.handlers.items()
        if method.stream_stream is not None
    }


def _options(is_client_facing: bool, more: Sequence[tuple[str, int]] = ()) -> list[tuple[str, int]]:
    """Of a server. is_client_facing: its callers are not the cluster's own."""
    options = dict((*SERVER_OPTIONS, *CONNECTION_OPTIONS))  # as gRPC takes the first of two, not the last
    options["grpc.max_allowed_incoming_connections"] = max_connections()
    if is_client_facing:
        options |= dict((*CLIENT_FACING_OPTIONS, *CLIENT_CONNECTION_OPTIONS))
    return [*(options | dict(more)).items()]


def _bind(server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None = None) -> str:
    """Returns the address with the port that was chosen. Raises StartupError."""
    try:
        port = server.add_insecure_port(listen) if credentials is None else server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise StartupError(f"cannot listen on {listen}: {error}") from error
    return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"


async def _in_time(change: Awaitable[None]) -> None:
    """A change of health. The servicer tells its watchers one after another and waits for each."""
    try:
        await asyncio.wait_for(change, HEALTH_TIMEOUT)
    except TimeoutError:
        logger.warning("a health watcher takes no messages")


def start_metrics(
    settings: ServerSettings, registry: prometheus_client.CollectorRegistry, pages: Mapping[str, Page]
) -> str | None:
    """Serves the registry and `pages` over HTTP. Returns `host:port`, or None when the settings say there is no
    endpoint."""
    if settings.metrics_port < 0:
        return None
    try:
        port = start_http(settings.metrics_host, settings.metrics_port, registry, pages)
    except OSError as error:
        where = f"{settings.metrics_host}:{settings.metrics_port}"
        raise StartupError(f"cannot serve metrics on {where}: {error}") from error
    return f"{settings.metrics_host}:{port}"


def spare_the_collector() -> None:
    """What is there now stays to the end, so Python's garbage collector need not look through it again and again: with
    torch loaded that takes a tenth of a second, in which the event loop stands still."""
    gc.collect()
    gc.freeze()


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


def _follower(server: RoleServer) -> Callable[[bool], None]:
    """Sets health from code that cannot wait; what is told last holds."""
    tasks: set[asyncio.Task[None]] = set()

    def follow(is_ready: bool) -> None:
        task = asyncio.ensure_future(server.set_ready(is_ready))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return follow


async def run(
    settings: ServerSettings,
    services: Sequence[Service],
    registry: prometheus_client.CollectorRegistry,
    before_ready: Callable[[], Awaitable[None]] | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = (),
    refused: Callable[[str], None] = lambda code: None,
    readiness: list[Callable[[bool], None]] | None = None,
    pages: Mapping[str, Page] = MappingProxyType({}),
) -> None:
    """Serves until a signal comes. Prints `METRICS <address>` and `READY <address>` on standard output, and before
    them `HEALTH <address>` if health has an address of its own.

    before_ready: what must have happened before the services are ready; health answers meanwhile.
    interceptors, refused: see RoleServer.
    pages: what the HTTP port has beside the metrics, by path.
    readiness: whoever puts a function in is told, once it is ready, by calling it whether the services are ready still.
    """
    stop = stop_signal(settings.exit_on_stdin_eof)
    calls = CallMetrics(registry, {service.name: service.handlers for service in services})
    server = RoleServer(services, settings, [calls, *interceptors], refused)
    address = await server.start(settings.listen)
    if server.health_address:
        print(f"HEALTH {server.health_address}", flush=True)  # noqa: T201
    try:
        metrics = start_metrics(settings, registry, pages)
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
        if readiness is not None:
            readiness.append(_follower(server))
        spare_the_collector()
        watching = asyncio.create_task(watch_lag(LoopMetrics(registry).lag.observe), name="loop lag")
        if metrics:
            print(f"METRICS {metrics}", flush=True)  # noqa: T201 - read by whoever started this process
        print(f"READY {address}", flush=True)  # noqa: T201
        await stop.wait()
        watching.cancel()
        logger.info("stopping")
    finally:
        await server.stop(settings.grace)
