"""The asynchronous client of a grokmoe service; `grokmoe.sync_client` is the same for code without an event loop.

Values are sent as they are and judged by the server: what the caller leaves unset stays unset on the wire. Every
call has a deadline. Every failure of a call is a `grokmoe.errors.GrokmoeError`, except that a cancelled task sees
its `asyncio.CancelledError`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, Unpack

from grpc_health.v1 import health_pb2

from grokmoe.channel import TIMEOUTS
from grokmoe.cluster_status import (
    ExpertRange,
    MoveCost,
    Rebalance,
    Status,
    build_move_request,
    read_move_cost,
    read_rebalance,
    read_status,
)
from grokmoe.connection import ClientOptions, Connection, Endpoint
from grokmoe.errors import DeadlineExceeded, Unavailable
from grokmoe.options import (
    GenerateOptions,
    Prompt,
    ScoreOptions,
    TokenizeOptions,
    build_detokenize_request,
    build_request,
    build_score_request,
    build_tokenize_request,
)
from grokmoe.results import (
    Completion,
    ModelInfo,
    ScoreResult,
    Tokens,
    read_completion,
    read_model,
    read_score,
    read_tokens,
)
from grokmoe.resumption import Resumption
from grokmoe.retry import Attempts, check_retries
from grokmoe.stream import AsyncStream
from grokmoe.target import SERVICE
from grokmoe.v1 import control_pb2
from grokmoe.v1 import generation_pb2 as pb

GENERATE_TIMEOUT = 600.0
"""Deadline of a generation unless the caller names one, seconds."""

RETRIES = 3
"""Most attempts after the first unless the caller says otherwise."""

MOVE_TIMEOUT = 3600.0
"""Deadline of moves of experts unless the caller names one, seconds: many of them are many gigabytes from a disk."""

READY_POLL = 0.1
"""Seconds between two looks at a service that is not ready."""


class AsyncClient:
    """A connection to one service, for use on one event loop: `async with AsyncClient("host:port") as client`.

    address: `host:port`, `unix:/path`, `dns:///name:port` or any gRPC target; or several servers of the same model,
    as a sequence of `host:port` or with commas between them. Nothing is sent before the first call.
    options: see `ClientOptions`.

    A call that fails before its first message is tried again, `retries` times at most and within its deadline:
    UNAVAILABLE, and RESOURCE_EXHAUSTED if the server says when (RetryInfo). The pause is the server's, else 0.1 s and
    doubling. Nothing else is, and nothing after the first message.

    The calls of a list, or of a `dns:///` name with several addresses, go round all servers that are healthy. `status`,
    `abort` and what moves experts then ask any one of them; to ask a certain one, make a client for it.

    Methods raise RuntimeError on a closed client and on another event loop than the first call's.
    """

    def __init__(self, address: str | Sequence[str], **options: Unpack[ClientOptions]) -> None:
        given: dict[str, Any] = dict(options)
        self.timeout: float = given.pop("timeout", GENERATE_TIMEOUT)
        self._retries = check_retries(given.pop("retries", RETRIES))
        self._endpoint = Endpoint(address, **given)
        self.address = self._endpoint.name
        """As given; several with commas."""
        self._connection: Connection | None = None
        self._closed = False

    def _connect(self) -> Connection:
        if self._closed:
            raise RuntimeError("this client is closed")
        if self._connection is None:
            self._connection = self._endpoint.open()
        if self._connection.loop is not asyncio.get_running_loop():
            raise RuntimeError("an AsyncClient belongs to the event loop that used it first")
        return self._connection

    def _attempts(self, timeout: float | None) -> Attempts:
        return Attempts(self._retries, self.timeout if timeout is None else timeout)

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Continues a prompt and answers once. Cancelling the task cancels the generation at the server.

        options: see `GenerateOptions`.
        timeout: deadline in seconds; None: the client's.

        Raises InvalidRequest (with `field`), ResourceExhausted and Unavailable (with `retry_after`, seconds),
        DeadlineExceeded, and the others of `GrokmoeError`.
        """
        request, connection = build_request(prompt, **options), self._connect()
        return read_completion(await connection.ask(connection.generation.Generate, request, self._attempts(timeout)))

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        resume: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream:
        """Continues a prompt and answers token by token. Arguments and errors are those of `generate`.

        resume: when the connection breaks in the middle, ask again, this server or another of the list, until the
            deadline, to go on after the tokens received. No token comes twice and none is left out. Not with `n` above
            1, `echo` or `prompt_logprobs`.
        """
        request = build_request(prompt, **options)
        if not resume:
            return AsyncStream(self._connect(), request, self._attempts(timeout))
        attempts = Attempts(sys.maxsize, self.timeout if timeout is None else timeout)
        return AsyncStream(self._connect(), request, attempts, Resumption(request))

    async def score(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[ScoreOptions]
    ) -> ScoreResult:
        """How likely the model finds a text, token by token; generates nothing.

        options: see `ScoreOptions`. timeout and errors: as for `generate`.
        """
        request, connection = build_score_request(prompt, **options), self._connect()
        return read_score(await connection.ask(connection.generation.Score, request, self._attempts(timeout)))

    async def tokenize(
        self, text: str, *, timeout: float = TIMEOUTS.tokenize, **options: Unpack[TokenizeOptions]
    ) -> Tokens:
        """The token ids of a text. options: see `TokenizeOptions`. timeout: seconds."""
        request, connection = build_tokenize_request(text, **options), self._connect()
        return read_tokens(await connection.ask(connection.generation.Tokenize, request, self._attempts(timeout)))

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        timeout: float = TIMEOUTS.tokenize,
    ) -> str:
        """The text of token ids, special tokens left out unless told otherwise. timeout: seconds."""
        request, connection = build_detokenize_request(token_ids, skip_special_tokens), self._connect()
        response = await connection.ask(connection.generation.Detokenize, request, self._attempts(timeout))
        return str(response.text)

    async def model(self, *, timeout: float = TIMEOUTS.describe) -> ModelInfo:
        """What is served. timeout: seconds."""
        connection = self._connect()
        return read_model(
            await connection.ask(connection.generation.GetModel, pb.GetModelRequest(), self._attempts(timeout))
        )

    async def status(self, *, timeout: float = TIMEOUTS.status) -> Status:
        """Workers, placement and load. timeout: seconds."""
        connection = self._connect()
        return read_status(
            await connection.ask(connection.control.GetStatus, control_pb2.GetStatusRequest(), self._attempts(timeout))
        )

    async def abort(self, request_ids: str | Sequence[str], *, timeout: float = TIMEOUTS.status) -> tuple[str, ...]:
        """Ends live requests, whoever sent them; their callers get what was made so far, with `FinishReason.ABORTED`.

        Returns those of the ids that were alive; what an attempt that was lost has ended is not among them.
        timeout: seconds.
        """
        ids, connection = [request_ids] if isinstance(request_ids, str) else request_ids, self._connect()
        request = control_pb2.AbortRequest(request_ids=ids)
        return tuple((await connection.ask(connection.control.Abort, request, self._attempts(timeout))).aborted_ids)

    async def move_experts(
        self,
        experts: int | ExpertRange | Sequence[int | ExpertRange],
        *,
        source: str | None = None,
        target: str | None = None,
        timeout: float = MOVE_TIMEOUT,
    ) -> MoveCost:
        """Moves experts to another expert worker while requests run; returns when it is done.

        experts: numbers, in all layers, or `ExpertRange`. source: address of the worker that gives them up; None: they
            are copied. target: of the one that takes them; None: they are dropped.
        timeout: seconds. A call that is left leaves the move to its end, and is never tried again.

        Raises InvalidRequest, NotFound for an address without a worker, FailedPrecondition for the last holder
        (LAST_HOLDER), ResourceExhausted when the target is full (NO_ROOM), Unavailable; after each of them nothing has
        changed.
        """
        request, connection = build_move_request(experts, source, target), self._connect()
        return read_move_cost(await connection.ask(connection.control.MoveExperts, request, Attempts(0, timeout)))

    async def rebalance_experts(
        self, *, dry_run: bool = False, force: bool = False, timeout: float = MOVE_TIMEOUT
    ) -> Rebalance:
        """Moves experts so that expert workers have even load, if it is worth it; returns when it is done.

        dry_run: only say what would be done. force: also when the gain does not exceed the cost.
        timeout: seconds. A call that is left leaves the moves to their end, and is never tried again.
        """
        request = control_pb2.RebalanceExpertsRequest(dry_run=dry_run, force=force)
        connection = self._connect()
        return read_rebalance(await connection.ask(connection.control.RebalanceExperts, request, Attempts(0, timeout)))

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
        connection, request = self._connect(), health_pb2.HealthCheckRequest(service=SERVICE)
        response = await connection.ask(connection.health.Check, request, Attempts(0, TIMEOUTS.status))
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Cancels what runs and disconnects. Closing again does nothing."""
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def __aenter__(self) -> Self:
        if self._closed:
            raise RuntimeError("this client is closed")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
