"""One stream of grokmoe.v1.Expert/Forward: requests between their first message and their answer."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import torch

from expert_worker.call_trace import CallTrace
from expert_worker.engine import ExpertEngine, ExpertResult
from expert_worker.experts import ExpertCall
from expert_worker.pair_end import PairEnd
from grokmoe import tensors
from grokmoe.errors import DeadlineExceeded, FailedPrecondition, InvalidRequest, Reason, Unavailable
from grokmoe.expert_messages import named_units
from grokmoe.logs import about
from grokmoe.pairs import Pair, PairBroken
from grokmoe.status import to_failure
from grokmoe.telemetry import ExpertMetrics
from grokmoe.tracing import Tracing, trace_id_of
from grokmoe.v1 import expert_pb2

logger = logging.getLogger(__name__)

MAX_IN_FLIGHT = 8
"""Requests of one stream between their last message and their answer. Beyond it the stream is not read, which makes
the caller's writes wait: memory per stream is bounded by this many requests of max_rows rows, and their results."""

DRAIN_LINGER = 0.25
"""Seconds that a stream is read on while the worker drains: what is on its way is refused in-band, which tells the
caller more than a stream that ends."""


def draining() -> Unavailable:
    """What a worker that is about to end answers."""
    return Unavailable("the worker is about to end", reason=Reason.SHUTTING_DOWN)


class ForwardStream:
    """The state of one Forward stream: unfinished requests, and those between reading and answering."""

    def __init__(
        self,
        engine: ExpertEngine,
        metrics: ExpertMetrics,
        max_rows: int,
        context: Any,
        tracing: Tracing | None = None,
        takes_pairs: bool = True,
    ) -> None:
        """tracing: where calls that belong to a trace are written; None: nowhere.

        takes_pairs: whether rows may come by a pair beside the stream (grokmoe.pairs).
        """
        self._engine = engine
        self._tracing = tracing
        self._metrics = metrics
        self._max_rows = max_rows
        self._context = context
        self._rows: tensors.RowAssembler[expert_pb2.ForwardRequest] = tensors.RowAssembler(
            expert_pb2.ForwardRequest, "request_id", max_rows, engine.experts.config.hidden_size
        )
        self._slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._writing = asyncio.Lock()
        self._ids: set[int] = set()
        self._caller = ""
        self._pending: dict[asyncio.Task[None], asyncio.Future[ExpertResult]] = {}
        experts = engine.experts
        self._pair = PairEnd(experts.device, experts.config.hidden_size, experts.dtype, takes_pairs)
        self._fetching: asyncio.Task[None] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._is_idle = False
        self._is_draining = False
        self._is_closed = False

    async def serve(self) -> None:
        """Reads until the caller is done, then answers what is left. Raises InvalidRequest for undecodable bytes."""
        self._reader = asyncio.create_task(self._read())
        try:
            await self._reader
        except asyncio.CancelledError:
            if not self._is_closed:
                raise
        if self._fetching is not None:
            await self._fetching
        await asyncio.gather(*self._pending)

    def drain(self) -> None:
        """Refuses what comes, soon reads no more; `serve` returns when all that was read before is answered."""
        self._is_draining = True
        asyncio.get_running_loop().call_later(DRAIN_LINGER, self._close)

    def _close(self) -> None:
        self._is_closed = True
        if self._reader is not None and self._is_idle:  # not in the middle of a write, which would stay half done
            self._reader.cancel()

    def drop(self) -> None:
        """Cancels what has not been answered."""
        for reader in (self._reader, self._fetching):
            if reader is not None:
                reader.cancel()
        self._pair.close()
        for task, future in self._pending.items():
            future.cancel()
            task.cancel()

    async def _read(self) -> None:
        while not self._is_closed:
            self._is_idle = True
            data = await self._context.read()
            self._is_idle = False
            if data is grpc.aio.EOF:  # type: ignore[attr-defined]
                return
            try:
                whole = self._rows.add(data)
            except InvalidRequest as error:
                self._metrics.requests.labels("refused").inc()
                if self._rows.failed_id is None:
                    raise
                await self._fail(self._rows.failed_id, error)
                continue
            if whole is None:
                continue
            request, rows_ND = whole
            if request.HasField("pair_offer"):
                await self._take_offer(request)
            elif request.pair_bytes:
                # Beside the reading: what comes in messages need not wait for a pair that may be broken.
                if self._fetching is not None:
                    await self._fetching
                self._fetching = asyncio.create_task(self._fetch(request))
                self._fetching.add_done_callback(_look_at)
            else:
                await self._take(request, rows_ND)

    async def _take_offer(self, request: expert_pb2.ForwardRequest) -> None:
        try:
            self._pair.take(request.pair_offer)
        except (InvalidRequest, FailedPrecondition) as error:
            await self._fail(request.request_id, error)
            return
        await self._write(expert_pb2.ForwardResponse(request_id=request.request_id))

    async def _fetch(self, request: expert_pb2.ForwardRequest) -> None:
        """The rows of a request, which come by the pair whatever becomes of it: both ends must stay in step."""
        try:
            pair, rows_ND = await self._pair.receive(sum(request.counts), request.pair_bytes, self._max_rows)
        except PairBroken as error:
            logger.info("rows have not come: %s", error.message)
            self._metrics.requests.labels("refused").inc()
            await self._write(expert_pb2.ForwardResponse(request_id=request.request_id, pair_lost=True))
            return
        await self._take(request, rows_ND, pair)

    async def _take(
        self, request: expert_pb2.ForwardRequest, rows_ND: torch.Tensor | None, pair: Pair | None = None
    ) -> None:
        """A request that is there as a whole. pair: where its rows came from, if not from its messages."""
        try:
            call = self._checked(request, rows_ND)
        except (InvalidRequest, FailedPrecondition) as error:
            self._metrics.requests.labels("refused").inc()
            await self._fail(request.request_id, error)
            return
        if self._is_draining:
            self._metrics.requests.labels("refused").inc()
            await self._fail(request.request_id, draining())
            return
        read_at = asyncio.get_running_loop().time()
        await self._slots.acquire()
        trace = None
        if self._tracing is not None and request.traceparents:  # before the queue: its time begins here
            trace = CallTrace(self._tracing, request.traceparents, request.layer, sum(request.counts))
        self._caller = request.caller or self._caller
        future = self._engine.submit(call, self._caller)
        del call  # while the stream is idle it must not keep weights that are to be freed
        self._ids.add(request.request_id)
        if request.timeout_ms:
            _drop_at(future, read_at + request.timeout_ms / 1000)
        task = asyncio.create_task(self._answer(request, future, pair, trace))
        self._pending[task] = future
        task.add_done_callback(self._pending.pop)

    def _checked(self, request: expert_pb2.ForwardRequest, rows_ND: torch.Tensor | None) -> ExpertCall:
        """The call, once nothing about it can fail but the computation."""
        if request.request_id in self._ids:
            raise InvalidRequest("request_id", f"is {request.request_id}, which is in flight on this stream")
        call = self._engine.experts.check(request.layer, named_units(request), tuple(request.counts), rows_ND)
        num_rows = len(call.rows.rows_ND)
        if num_rows > self._max_rows:
            raise InvalidRequest("payload.shape", f"has {num_rows} rows, limit is {self._max_rows}")
        return call

    async def _answer(
        self,
        request: expert_pb2.ForwardRequest,
        future: asyncio.Future[ExpertResult],
        pair: Pair | None,
        trace: CallTrace | None,
    ) -> None:
        """Awaits one result and writes it, or has the pair send its rows if that is where the request's came from.

        Encoding stays on the event loop: it is one memory copy of at most MAX_CHUNK_BYTES between two writes, done
        holding the interpreter's lock in any thread. The lock is per message, so that a small answer can slip in
        between the parts of a large one.
        """
        request_id, result, error_of_trace = request.request_id, None, ""
        try:
            try:
                result = await _result(future)
            except DeadlineExceeded as error:
                error_of_trace = error.message
                self._metrics.requests.labels("expired").inc()
                self._ids.discard(request_id)
                await self._fail(request_id, error)
                return
            except Exception as error:
                error_of_trace = str(error) or type(error).__name__
                trace_ids = [trace_id_of(parent) for parent in request.traceparents]
                logger.exception("request %d failed", request_id, exc_info=error, extra=about(trace_ids=trace_ids))
                self._metrics.requests.labels("failed").inc()
                self._ids.discard(request_id)
                await self._fail(request_id, error)
                return
            header = expert_pb2.ForwardResponse(
                request_id=request_id,
                queue_ns=result.queue_ns,
                compute_ns=result.compute_ns,
                batch_rows=result.batch_rows,
                revision=self._engine.experts.holdings.revision,
            )
            if pair is not None and pair.error is None:
                header.pair_bytes = result.rows_ND.nbytes
                self._ids.discard(request_id)
                await self._write(header)
                await pair.send(result.rows_ND)
                self._metrics.requests.labels("ok").inc()
                return
            messages = tensors.encode_rows(header, result.rows_ND, "request_id")
            message = next(messages, None)
            while message is not None:
                following = next(messages, None)
                if following is None:  # the caller may use the id again as soon as it has this message
                    self._ids.discard(request_id)
                async with self._writing:
                    await self._context.write(message)
                message = following
            self._metrics.requests.labels("ok").inc()
        except grpc.aio.BaseError as error:
            logger.debug("request %d: the caller is gone: %s", request_id, error)
        except PairBroken as error:  # the caller notices it, too, and asks again
            logger.info("request %d: its rows were not sent: %s", request_id, error.message)
        finally:
            future.cancel()  # if this task was cancelled: nobody waits for it, so it need not be computed
            self._slots.release()
            if trace is not None:
                trace.end(result, error_of_trace or ("" if result is not None else "the caller is gone"))

    async def _fail(self, request_id: int, error: Exception) -> None:
        revision = self._engine.experts.holdings.revision
        await self._write(
            expert_pb2.ForwardResponse(request_id=request_id, failure=to_failure(error), revision=revision)
        )

    async def _write(self, answer: expert_pb2.ForwardResponse) -> None:
        """An answer without rows in it."""
        async with self._writing:
            await self._context.write(tensors.encode(answer))


def _look_at(task: asyncio.Task[None]) -> None:
    """What has ended it concerns nobody when the stream is over, too."""
    if not task.cancelled():
        task.exception()


def _drop_at(future: asyncio.Future[ExpertResult], when: float) -> None:
    """Drops a call that has no answer at `when` (time of the loop): if it waits still, it is never computed."""
    timer = asyncio.get_running_loop().call_at(when, future.cancel)
    future.add_done_callback(lambda _: timer.cancel())


async def _result(future: asyncio.Future[ExpertResult]) -> ExpertResult:
    """Raises DeadlineExceeded when the call has been dropped."""
    await asyncio.wait((future,))
    if future.cancelled():
        raise DeadlineExceeded("nobody waits for the answer any more")
    return future.result()
