"""The asynchronous client of a grokmoe service; `grokmoe.sync_client` is the same for code without an event loop.

Values are sent as they are and judged by the server: what the caller leaves unset stays unset on the wire. Every
call has a deadline. Every failure of a call is a `grokmoe.errors.GrokmoeError`, except that a cancelled task sees
its `asyncio.CancelledError`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from grokmoe.channel import RECONNECT_OPTIONS, TIMEOUTS, open_channel
from grokmoe.errors import Cancelled, DeadlineExceeded, InternalError, Unavailable
from grokmoe.options import GenerateOptions, Prompt, build_request
from grokmoe.results import (
    Completion,
    Delta,
    ModelInfo,
    Status,
    read_completion,
    read_delta,
    read_model,
    read_status,
)
from grokmoe.status import from_rpc_error
from grokmoe.v1 import control_pb2, control_pb2_grpc, generation_pb2_grpc
from grokmoe.v1 import generation_pb2 as pb

GENERATE_TIMEOUT = 600.0
"""Deadline of a generation unless the caller names one, seconds."""

READY_POLL = 0.1
"""Seconds between two looks at a service that is not ready."""

SERVICE: str = pb.DESCRIPTOR.services_by_name["Generation"].full_name


@contextlib.contextmanager
def _typed_errors() -> Iterator[None]:
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


class AsyncStream:
    """The deltas of one generation, an async iterator. It has begun when it is made.

    Leaving it early, `aclose()`, or the end of an `async with` block around it cancels the generation at the
    server; so does cancelling a task that waits for a delta. Errors are those of `AsyncClient.generate`; after one,
    and after the end, there are no more deltas.
    """

    def __init__(self, call: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._call = call
        self._messages = aiter(call)
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._last: Delta | None = None
        self._ended = False
        self.request_id = ""
        """As given, or as the server drew it; empty before the first delta."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        try:
            with _typed_errors():
                message = await anext(self._messages, None)
            if message is None and (self._last is None or self._last.finish_reason is None):
                raise InternalError("the server ended the stream without a finish reason")
        except BaseException:
            self.cancel_soon()
            raise
        if message is None:
            self._ended = True
            raise StopAsyncIteration
        self.request_id = message.request_id
        self._last = delta = read_delta(message)
        self._text.append(delta.text)
        self._token_ids.extend(delta.token_ids)
        return delta

    async def completion(self) -> Completion:
        """Reads on to the end. The whole answer, deltas read before included. Cancelled if the stream was left."""
        async for _ in self:
            pass
        last = self._last
        if last is None or last.finish_reason is None or last.timing is None:
            raise Cancelled("the stream was left before its end")
        text, token_ids = "".join(self._text), tuple(self._token_ids)
        return Completion(self.request_id, text, token_ids, last.finish_reason, last.usage, last.timing)

    async def aclose(self) -> None:
        """Cancels the generation if it still runs."""
        self.cancel_soon()

    def cancel_soon(self) -> None:
        """As `aclose`, from any thread, at any time and without waiting."""
        if not self._ended:
            self._ended = True
            # A closed loop has ended the call.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._call.cancel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self.cancel_soon()


@dataclasses.dataclass(frozen=True)
class _Connection:
    """A channel and its stubs; it belongs to the loop on which it was opened."""

    loop: asyncio.AbstractEventLoop
    channel: grpc.aio.Channel
    generation: Any
    control: Any
    health: Any

    @classmethod
    def open(cls, address: str) -> Self:
        channel = open_channel(address, RECONNECT_OPTIONS)
        generation = generation_pb2_grpc.GenerationStub(channel)  # type: ignore[no-untyped-call]
        control = control_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call]
        return cls(asyncio.get_running_loop(), channel, generation, control, health_pb2_grpc.HealthStub(channel))


class AsyncClient:
    """A connection to one service, for use on one event loop: `async with AsyncClient("host:port") as client`.

    address: `host:port`, `unix:/path` or any gRPC target. Nothing is sent before the first call.
    timeout: deadline of a generation, seconds, unless a call names its own.

    Methods raise RuntimeError on a closed client and on another event loop than the first call's.
    """

    def __init__(self, address: str, *, timeout: float = GENERATE_TIMEOUT) -> None:
        self.address = address
        self.timeout = timeout
        self._connection: _Connection | None = None
        self._closed = False

    def _connect(self) -> _Connection:
        if self._closed:
            raise RuntimeError("this client is closed")
        if self._connection is None:
            self._connection = _Connection.open(self.address)
        if self._connection.loop is not asyncio.get_running_loop():
            raise RuntimeError("an AsyncClient belongs to the event loop that used it first")
        return self._connection

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Continues a prompt and answers once. Cancelling the task cancels the generation at the server.

        options: see `GenerateOptions`.
        timeout: deadline in seconds; None: the client's.

        Raises InvalidRequest (with `field`), ResourceExhausted and Unavailable (with `retry_after`, seconds),
        DeadlineExceeded, and the others of `GrokmoeError`.
        """
        request, stub = build_request(prompt, **options), self._connect().generation
        with _typed_errors():
            response = await stub.Generate(request, timeout=self.timeout if timeout is None else timeout)
        return read_completion(response)

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncStream:
        """Continues a prompt and answers token by token. Arguments and errors are those of `generate`."""
        request, stub = build_request(prompt, **options), self._connect().generation
        return AsyncStream(
            stub.StreamGenerate(
                pb.StreamGenerateRequest(generate=request), timeout=self.timeout if timeout is None else timeout
            )
        )

    async def model(self, *, timeout: float = TIMEOUTS.describe) -> ModelInfo:
        """What is served. timeout: seconds."""
        stub = self._connect().generation
        with _typed_errors():
            return read_model(await stub.GetModel(pb.GetModelRequest(), timeout=timeout))

    async def status(self, *, timeout: float = TIMEOUTS.status) -> Status:
        """Workers, placement and load. timeout: seconds."""
        stub = self._connect().control
        with _typed_errors():
            return read_status(await stub.GetStatus(control_pb2.GetStatusRequest(), timeout=timeout))

    async def wait_ready(self, timeout: float) -> None:
        """Returns when the service accepts generations; DeadlineExceeded, with the reason, after `timeout` seconds.

        A server that does not have the service is an error at once (NotFound, InternalError).
        """
        reason = "no answer"
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        if await self._serving():
                            return
                        reason = "not serving"
                    except (Unavailable, DeadlineExceeded) as error:
                        reason = error.message
                    await asyncio.sleep(READY_POLL)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.address} is not ready after {timeout} s: {reason}") from None

    async def _serving(self) -> bool:
        stub = self._connect().health
        with _typed_errors():
            response = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=TIMEOUTS.status)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Cancels what runs and disconnects. Closing again does nothing."""
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.channel.close(None)

    async def __aenter__(self) -> Self:
        self._connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
