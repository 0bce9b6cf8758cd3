"""The client for code without an event loop: `AsyncClient` on a loop in a thread of its own, and nothing else."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from grokmoe.channel import TIMEOUTS
from grokmoe.client import MOVE_TIMEOUT, AsyncClient
from grokmoe.cluster_status import ExpertRange, MoveCost, Rebalance, Status
from grokmoe.connection import ClientOptions
from grokmoe.errors import Cancelled
from grokmoe.options import GenerateOptions, Prompt, ScoreOptions, TokenizeOptions
from grokmoe.results import Completion, Delta, ModelInfo, ScoreResult, Tokens
from grokmoe.stream import AsyncStream

T = TypeVar("T")


def _handle_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # gRPC wakes the loops of all threads for one event, and each that finds it taken raises. It means nothing:
    # https://github.com/grpc/grpc/issues/25364
    late = isinstance(context.get("exception"), BlockingIOError)
    if not (late and "PollerCompletionQueue" in repr(context.get("handle"))):
        loop.default_exception_handler(context)


class _LoopThread:
    """A thread that runs an event loop, on it one client, until `stop`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_handle_exception)
        self._stopping = asyncio.Event()
        # Whatever is handed over before the stop signal has become a task when the loop sees the signal, and every
        # task is ended with the loop. Without the lock one could come later and its caller would wait for ever.
        # Re-entrant, for a signal handler that closes the client.
        self._lock = threading.RLock()
        self._stopped = False
        self._thread = threading.Thread(target=self._main, name="grokmoe-client", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._until_stopped())

    async def _until_stopped(self) -> None:
        async with self._client:
            await self._stopping.wait()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the loop and waits for it; an interrupted wait (Ctrl-C) cancels it."""
        with self._lock:
            if self._stopped:
                coroutine.close()
                raise RuntimeError("this client is closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Cancelled("the client was closed during the call") from None
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Closes the client and ends the thread. Stopping again does nothing."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()


class Stream:
    """The deltas of one generation, an iterator. It has begun when it is made.

    Leaving it early, `close()`, or the end of a `with` block around it cancels the generation at the server. Errors
    are those of `Client.generate`; after one, and after the end, there are no more deltas.
    """

    def __init__(self, thread: _LoopThread, stream: AsyncStream) -> None:
        self._thread = thread
        self._stream = stream

    @property
    def request_id(self) -> str:
        """As given, or as the server drew it; empty before the first delta."""
        return self._stream.request_id

    @property
    def trace_id(self) -> str:
        """Of the trace it is part of, 32 hexadecimal digits; empty: the client has no `tracer_provider`."""
        return self._stream.trace_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        delta = self._thread.run(self._next())
        if delta is None:
            raise StopIteration
        return delta

    async def _next(self) -> Delta | None:
        return await anext(self._stream, None)

    def completion(self) -> Completion:
        """Reads on to the end; the whole answer, deltas read before included. Cancelled if the stream was left."""
        return self._thread.run(self._stream.completion())

    def close(self) -> None:
        """Cancels the generation if it still runs."""
        self._stream.cancel_soon()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """A connection to one service, for any number of threads: `with Client("host:port") as client`.

    Arguments, results and errors are those of `AsyncClient`. Calls of several threads run side by side. A client
    has one background thread, from its making until `close()`.
    """

    def __init__(self, address: str | Sequence[str], **options: Unpack[ClientOptions]) -> None:
        self._client = AsyncClient(address, **options)
        self._thread = _LoopThread(self._client)

    @property
    def address(self) -> str:
        """As given; several with commas."""
        return self._client.address

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Continues a prompt and answers once. See `AsyncClient.generate`."""
        return self._thread.run(self._client.generate(prompt, timeout=timeout, **options))

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        resume: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """Continues a prompt and answers token by token. See `AsyncClient.stream`."""

        async def begin() -> AsyncStream:
            return self._client.stream(prompt, timeout=timeout, resume=resume, **options)

        return Stream(self._thread, self._thread.run(begin()))

    def score(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[ScoreOptions]) -> ScoreResult:
        """How likely the model finds a text. See `AsyncClient.score`."""
        return self._thread.run(self._client.score(prompt, timeout=timeout, **options))

    def tokenize(self, text: str, *, timeout: float = TIMEOUTS.tokenize, **options: Unpack[TokenizeOptions]) -> Tokens:
        """The token ids of a text. See `AsyncClient.tokenize`."""
        return self._thread.run(self._client.tokenize(text, timeout=timeout, **options))

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        timeout: float = TIMEOUTS.tokenize,
    ) -> str:
        """The text of token ids. See `AsyncClient.detokenize`."""
        call = self._client.detokenize(token_ids, skip_special_tokens=skip_special_tokens, timeout=timeout)
        return self._thread.run(call)

    def model(self, *, timeout: float = TIMEOUTS.describe) -> ModelInfo:
        """What is served. timeout: seconds."""
        return self._thread.run(self._client.model(timeout=timeout))

    def status(self, *, timeout: float = TIMEOUTS.status) -> Status:
        """Workers, placement and load. timeout: seconds."""
        return self._thread.run(self._client.status(timeout=timeout))

    def abort(self, request_ids: str | Sequence[str], *, timeout: float = TIMEOUTS.status) -> tuple[str, ...]:
        """Ends live requests, whoever sent them. See `AsyncClient.abort`."""
        return self._thread.run(self._client.abort(request_ids, timeout=timeout))

    def move_experts(
        self,
        experts: int | ExpertRange | Sequence[int | ExpertRange],
        *,
        source: str | None = None,
        target: str | None = None,
        timeout: float = MOVE_TIMEOUT,
    ) -> MoveCost:
        """Moves experts to another expert worker while requests run. See `AsyncClient.move_experts`."""
        call = self._client.move_experts(experts, source=source, target=target, timeout=timeout)
        return self._thread.run(call)

    def rebalance_experts(
        self, *, dry_run: bool = False, force: bool = False, timeout: float = MOVE_TIMEOUT
    ) -> Rebalance:
        """Moves experts so that expert workers have even load. See `AsyncClient.rebalance_experts`."""
        return self._thread.run(self._client.rebalance_experts(dry_run=dry_run, force=force, timeout=timeout))

    def wait_ready(self, timeout: float) -> None:
        """Returns when the service accepts generations. See `AsyncClient.wait_ready`."""
        self._thread.run(self._client.wait_ready(timeout))

    def close(self) -> None:
        """Cancels what runs, disconnects and ends the background thread. Closing again does nothing."""
        self._thread.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
