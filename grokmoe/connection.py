"""A client's connection: what it is opened with, its stubs, and one call on it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

import grpc
from grpc_health.v1 import health_pb2_grpc

from grokmoe.call_spans import UNTRACED, CallSpan, CallSpans
from grokmoe.channel import RECONNECT_OPTIONS, open_channel
from grokmoe.credentials import (
    CallMetadata,
    Metadata,
    TlsConfig,
    Token,
    channel_credentials,
    channel_options,
)
from grokmoe.errors import Cancelled, ConfigError, GrokmoeError
from grokmoe.retry import Attempts
from grokmoe.status import from_rpc_error
from grokmoe.target import parse_target
from grokmoe.v1 import control_pb2_grpc, generation_pb2_grpc


class ClientOptions(TypedDict, total=False):
    """Optional arguments of a client. ConfigError, when the client is made: one that cannot be."""

    timeout: float
    """Deadline of a generation unless a call names its own, seconds; default 600."""
    retries: int
    """Most attempts of a call after the first; default 3, 0: none. See `AsyncClient` for what is tried again."""
    tls: TlsConfig | bool | None
    """True: TLS, with the authorities that gRPC brings along. Default: none."""
    token: Token | None
    """Bearer token of every call, or what returns it. Refused without TLS unless the server is on this host."""
    allow_insecure_token: bool
    """Send the token without TLS, to be read by everyone on the way; default False."""
    metadata: Metadata | None
    """What goes with every call, such as traceparent, or what returns it."""
    tracer_provider: Any
    """An OpenTelemetry TracerProvider: every call is a span of its, and the parent of the server's. Default: none."""


class Endpoint:
    """What a connection is opened with, checked."""

    def __init__(
        self,
        address: str | Sequence[str],
        tls: TlsConfig | bool | None = None,
        token: Token | None = None,
        allow_insecure_token: bool = False,
        metadata: Metadata | None = None,
        tracer_provider: Any = None,
    ) -> None:
        """Arguments are those of `ClientOptions`. ConfigError: they do not go together, or a file cannot be read."""
        self._target = parse_target(address)
        self._tls = TlsConfig() if tls is True else tls or None
        if token is not None and self._tls is None and not (self._target.is_local or allow_insecure_token):
            raise ConfigError("a token needs tls, or everyone on the way can read it; else say allow_insecure_token")
        if self._tls is not None and self._target.is_list and self._tls.server_name is None:
            raise ConfigError("tls to a list of addresses needs server_name, the name in the servers' certificates")
        self._credentials = None if self._tls is None else channel_credentials(self._tls)
        self._metadata = CallMetadata(token, metadata)
        self._spans = None if tracer_provider is None else CallSpans(tracer_provider)
        if not callable(token) and not callable(metadata):
            self._metadata.build()  # a mistake is better told now than at the first call

    @property
    def name(self) -> str:
        """For messages."""
        return ",".join(self._target.addresses)

    def open(self) -> Connection:
        """Opens a channel on the running event loop; nothing is sent. Unavailable: a name cannot be looked up."""
        options = (*RECONNECT_OPTIONS, *self._target.options, *(channel_options(self._tls) if self._tls else ()))
        return Connection(open_channel(self._target.uri(), options, self._credentials), self._metadata, self._spans)


class Connection:
    """A channel and its stubs; it belongs to the loop on which it was opened."""

    def __init__(self, channel: grpc.aio.Channel, metadata: CallMetadata, spans: CallSpans | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.generation: Any = generation_pb2_grpc.GenerationStub(channel)  # type: ignore[no-untyped-call]
        self.control: Any = control_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call]
        self.health: Any = health_pb2_grpc.HealthStub(channel)
        self._channel = channel
        self._metadata, self._spans = metadata, spans
        self._pauses: set[asyncio.Future[None]] = set()
        self._closed = False

    def span(self, request: Any) -> CallSpan:
        """A call begins; whoever makes it ends its span."""
        return UNTRACED if self._spans is None else self._spans.begin(request)

    def begin(self, method: Callable[..., Any], request: Any, attempts: Attempts, span: CallSpan = UNTRACED) -> Any:
        """Begins one attempt of a call. Cancelled if the connection was closed."""
        if self._closed:
            raise Cancelled("the client was closed during the call")
        span.attempt()
        metadata = (*self._metadata.build(), *span.metadata.items())
        return method(request, timeout=attempts.remaining(), metadata=metadata)

    async def ask(self, method: Callable[..., Any], request: Any, attempts: Attempts) -> Any:
        """The answer of a call that has one, tried again as `attempts` says. Raises GrokmoeError."""
        span = self.span(request)
        try:
            answer = await self._ask(method, request, attempts, span)
        except BaseException as error:
            span.end(error)
            raise
        span.end()
        return answer

    async def _ask(self, method: Callable[..., Any], request: Any, attempts: Attempts, span: CallSpan) -> Any:
        while True:
            try:
                with typed_errors():
                    return await self.begin(method, request, attempts, span)
            except GrokmoeError as error:
                delay = attempts.delay_after(error)
                if delay is None:
                    raise
            with typed_errors():
                await self.pause(delay)

    def pause(self, seconds: float) -> asyncio.Future[None]:
        """Done after that time; cancelled when the connection is closed before."""
        pause: asyncio.Future[None] = self.loop.create_future()
        # A cancelled one may find its timer due in the same turn of the loop.
        timer = self.loop.call_later(seconds, lambda: None if pause.done() else pause.set_result(None))
        self._pauses.add(pause)
        pause.add_done_callback(self._pauses.discard)
        pause.add_done_callback(lambda _: timer.cancel())
        return pause

    async def close(self) -> None:
        """Cancels what runs and disconnects."""
        self._closed = True
        for pause in tuple(self._pauses):
            pause.cancel()
        await self._channel.close(None)


@contextlib.contextmanager
def typed_errors() -> Iterator[None]:
    """Turns what a gRPC call raises into grokmoe.errors."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    except asyncio.CancelledError:
        # Closing a stream or the client makes its calls say this too, in tasks that nobody cancelled.
        task = asyncio.current_task()
        if task is not None and not task.cancelling():
            raise Cancelled("the stream or the client was closed during the call") from None
        raise
