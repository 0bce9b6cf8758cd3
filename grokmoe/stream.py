"""The deltas of one generation, for code on an event loop."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any, Self

from grokmoe.completion_builder import CompletionBuilder
from grokmoe.connection import Connection, typed_errors
from grokmoe.errors import Cancelled, GrokmoeError, InternalError
from grokmoe.results import Completion, Delta, read_delta
from grokmoe.resumption import Resumption
from grokmoe.retry import Attempts
from grokmoe.v1 import generation_pb2 as pb


class AsyncStream:
    """The deltas of one generation, an async iterator. It has begun when it is made.

    Leaving it early, `aclose()`, or the end of an `async with` block around it cancels the generation at the
    server; so does cancelling a task that waits for a delta. Errors are those of `AsyncClient.generate`; after one,
    and after the end, there are no more deltas. What fails before the first delta is tried again; what fails later only
    with a resumption.
    """

    def __init__(
        self,
        connection: Connection,
        request: pb.GenerateRequest,
        attempts: Attempts,
        resumption: Resumption | None = None,
    ) -> None:
        self._ended = False
        self._received = False
        self._call: Any = None
        """What can be cancelled: the call, or the pause before the next attempt."""
        self._loop = connection.loop
        self._connection = connection
        self._request = request
        self._attempts = attempts
        self._resumption = resumption
        self._builder = CompletionBuilder(request.sampling.n if request.sampling.HasField("n") else 1)
        self.request_id = ""
        """As given, or as the server drew it; empty before the first delta."""
        self._span = connection.span(request)
        self.trace_id = self._span.trace_id
        """Of the trace it is part of, 32 hexadecimal digits; empty: the client has no `tracer_provider`."""
        self._begin()

    def _begin(self) -> None:
        request = pb.StreamGenerateRequest(generate=self._request)
        method = self._connection.generation.StreamGenerate
        self._call = self._connection.begin(method, request, self._attempts, self._span)
        self._messages = aiter(self._call)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        try:
            message = await self._next_message()
            if message is None and not self._builder.is_complete:
                raise InternalError("the server ended the stream without a finish reason")
            if message is not None:
                if self._resumption is not None:
                    self._resumption.add(message)
                delta = read_delta(message)
                self._builder.add(delta)
        except BaseException as error:
            self._span.end(error)
            self.cancel_soon()
            raise
        if message is None:
            self._ended = True
            self._span.end()
            raise StopAsyncIteration
        self._received = True
        self.request_id = message.request_id
        return delta

    async def _next_message(self) -> Any:
        """The next message; None at the end."""
        while True:
            try:
                with typed_errors():
                    return await anext(self._messages, None)
            except GrokmoeError as error:
                is_final = self._received and self._resumption is None
                delay = None if is_final else self._attempts.delay_after(error)
                if delay is None:
                    raise
            self._call = self._connection.pause(delay)
            with typed_errors():
                await self._call
            if self._ended:
                raise Cancelled("the stream was left")
            self._begin()

    async def completion(self) -> Completion:
        """Reads on to the end. The whole answer, deltas read before included. Cancelled if the stream was left."""
        async for _ in self:
            pass
        if not self._builder.is_complete:
            raise Cancelled("the stream was left before its end")
        return self._builder.build(self.request_id)

    async def aclose(self) -> None:
        """Cancels the generation if it still runs."""
        self.cancel_soon()

    def cancel_soon(self) -> None:
        """As `aclose`, from any thread, at any time and without waiting."""
        if not self._ended:
            self._ended = True
            self._span.end()
            # On the loop, where a new attempt cannot begin meanwhile. A closed loop has ended the call.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._ended and self._call is not None:
            self._span.end()
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._call.cancel)
