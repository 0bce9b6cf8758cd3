"""An expert worker behind gRPC. Letters: N rows, D hidden."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc
import torch

from grokmoe import tensors
from grokmoe.channel import TIMEOUTS
from grokmoe.errors import ConfigError, GrokmoeError, InvalidRequest, Unavailable
from grokmoe.expert_messages import RangeMessage, from_messages, name_units, to_messages
from grokmoe.status import from_failure, from_rpc_error
from grokmoe.trace_context import traceparents
from grokmoe.v1 import expert_pb2
from router.placement import ExpertLayers
from router.transport.base import CorruptReply, ExpertInfo, ExpertReply, Loaded
from router.transport.grpc_stream import ANY_ROWS, Stream, describe
from router.transport.worker_access import PLAIN, WorkerAccess, WorkerChannel

SERVICE = "grokmoe.v1.Expert"

Answer = tuple[expert_pb2.ForwardResponse, torch.Tensor | None]


class ExpertStream:
    """One lane to one expert worker: requests out in order, responses matched by id.

    An answer to a call that has been given up, a second one, and one to an id that was never used are discarded.
    """

    def __init__(self, channel: WorkerChannel, max_rows: int, width: int | None, on_end: Callable[[str], None]) -> None:
        """on_end: told why when the worker has ended the stream and no call is there to notice."""
        self._on_end, self._caller = on_end, channel.caller
        self._stream = Stream(channel, f"/{SERVICE}/Forward")
        self._rows: tensors.RowAssembler[expert_pb2.ForwardResponse] = tensors.RowAssembler(
            expert_pb2.ForwardResponse, "request_id", max_rows, width
        )
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._next_id = 0
        self._writing = asyncio.Lock()
        self._writes: set[asyncio.Task[None]] = set()
        self.num_discarded = 0
        self.error: Unavailable | None = None
        self._reader = asyncio.ensure_future(self._read())

    async def call(self, request: expert_pb2.ForwardRequest, rows_ND: torch.Tensor | None) -> Answer:
        """The answer to a request. rows_ND: None where its rows are not in its messages.

        Raises Unavailable when the stream is over, CorruptReply for an answer that cannot be read.
        """
        self._next_id += 1
        request_id = request.request_id = self._next_id
        if request_id == 1:
            request.caller = self._caller
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        try:
            if not self._write_now(request, rows_ND):
                # A task of its own, because gRPC cancels a stream when one of its writes is cancelled: a caller that
                # leaves in the middle of a large request must not take the other calls with it.
                messages = (
                    [tensors.encode(request)]
                    if rows_ND is None
                    else tensors.encode_rows(request, rows_ND, "request_id")
                )
                write = asyncio.ensure_future(self._write(request_id, messages))
                self._writes.add(write)
                write.add_done_callback(self._writes.discard)
            return await future
        finally:
            del self._waiting[request_id]

    def _write_now(self, request: expert_pb2.ForwardRequest, rows_ND: torch.Tensor | None) -> bool:
        """Saves the task where the request is one message and the stream takes it at once."""
        if not self._stream.is_direct or self._writes:
            return False
        if rows_ND is not None and (
            rows_ND.nbytes > tensors.MAX_CHUNK_BYTES or rows_ND.dtype not in (torch.float32, torch.bfloat16)
        ):
            return False  # of a type that cannot be sent the other way says so
        return self._stream.write_now(tensors.encode(request, rows_ND))

    async def _write(self, request_id: int, messages: Iterable[bytes]) -> None:
        async with self._writing:
            if request_id not in self._waiting:  # given up before its turn came
                return
            try:
                await self._stream.write(messages)
            except GrokmoeError as error:
                self._end(error)
            except Exception as error:  # a bug, such as a type without a codec; nobody must wait for its answer
                self._end(Unavailable(f"a request could not be written: {type(error).__name__}: {error}"))
                raise

    async def _read(self) -> None:
        try:
            while True:
                data = await self._stream.read()
                try:
                    message = self._rows.add(data)
                except InvalidRequest as error:
                    if self._rows.failed_id is None:
                        raise
                    self._settle(self._rows.failed_id, CorruptReply(f"the answer cannot be read: {error.message}"))
                    continue
                if message is not None:
                    self._settle(message[0].request_id, message)
        except GrokmoeError as error:
            is_unnoticed = self.error is None and not self._waiting
            self._end(error)
            if is_unnoticed:
                self._on_end(error.message)
        finally:
            self._end(Unavailable("the stream was closed"))

    def _settle(self, request_id: int, outcome: Answer | CorruptReply) -> None:
        future = self._waiting.get(request_id)
        if future is None or future.done():
            self.num_discarded += 1
        elif isinstance(outcome, CorruptReply):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def _end(self, error: GrokmoeError) -> None:
        """Fails all calls. The first error is the one that counts; for callers it is always a lost worker."""
        if self.error is None:
            self.error = error if isinstance(error, Unavailable) else Unavailable(error.message)
            self._stream.cancel()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(self.error)

    def cancel(self) -> None:
        self._end(Unavailable("the stream was closed"))
        self._reader.cancel()


class GrpcExpertLink:
    """An expert worker at an address."""

    def __init__(self, address: str, access: WorkerAccess = PLAIN) -> None:
        self.address = address
        self._channel = access.open(address)
        self._lanes: dict[int, ExpertStream] = {}
        self._max_rows, self._width = ANY_ROWS, 0
        self._on_end: Callable[[str], None] = lambda why: None

    async def describe(self) -> ExpertInfo:
        """See ExpertLink."""
        reply = await describe(
            self._channel, SERVICE, expert_pb2.ExpertDescribeRequest(), expert_pb2.ExpertDescribeResponse
        )
        self._max_rows, self._width = reply.max_rows, reply.hidden_size
        return ExpertInfo(
            config_hash=reply.config_hash,
            incarnation=reply.incarnation,
            dtype=tensors.torch_dtype(reply.dtype),
            expert_dtype=reply.expert_dtype,
            experts=self._ranges(reply.experts),
            max_rows=reply.max_rows,
            device=reply.device,
            is_draining=reply.draining,
            revision=reply.revision,
            loading=self._ranges(reply.loading),
            expert_bytes=reply.expert_bytes,
            capacity=reply.capacity,
        )

    def _ranges(self, messages: Sequence[RangeMessage]) -> tuple[ExpertLayers, ...]:
        try:
            return tuple(from_messages(messages))
        except InvalidRequest as error:
            raise ConfigError(f"{self.address} says what it holds, but {error.message}") from error

    async def forward(
        self,
        lane: int,
        layer: int,
        expert_ids: tuple[int, ...],
        counts: tuple[int, ...],
        rows_ND: torch.Tensor,
        timeout: float | None = None,
    ) -> ExpertReply:
        """See ExpertLink."""
        request = make_request(layer, expert_ids, counts, timeout)
        return make_reply(await self.stream(lane).call(request, rows_ND), rows_ND)

    def stream(self, lane: int) -> ExpertStream:
        """The lane's stream; another one when the last is over."""
        stream = self._lanes.get(lane)
        if stream is None or stream.error is not None:
            stream = self._lanes[lane] = ExpertStream(self._channel, self._max_rows, self._width or None, self._on_end)
        return stream

    async def load(self, config_hash: str, experts: Sequence[ExpertLayers], timeout: float) -> Loaded:
        """See ExpertLink."""
        request = expert_pb2.ExpertLoadRequest(config_hash=config_hash, experts=to_messages(experts))
        reply = await self._ask("Load", request, expert_pb2.ExpertLoadResponse, timeout)
        return Loaded(reply.loaded_bytes, reply.load_ns / 1e9)

    async def unload(self, config_hash: str, experts: Sequence[ExpertLayers]) -> None:
        """See ExpertLink."""
        request = expert_pb2.ExpertUnloadRequest(config_hash=config_hash, experts=to_messages(experts))
        await self._ask("Unload", request, expert_pb2.ExpertUnloadResponse, TIMEOUTS.describe)

    async def _ask(self, method: str, request: Any, response: Any, timeout: float) -> Any:
        try:
            return await self._channel.unary(f"/{SERVICE}/{method}", request, response, timeout)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    def watch(self, on_end: Callable[[str], None]) -> None:
        """See ExpertLink."""
        self._on_end = on_end

    def reset(self, lane: int) -> None:
        """See ExpertLink."""
        stream = self._lanes.pop(lane, None)
        if stream is not None:
            stream.cancel()

    async def close(self) -> None:
        """See ExpertLink."""
        for stream in self._lanes.values():
            stream.cancel()
        await self._channel.close(None)


def make_request(
    layer: int, expert_ids: tuple[int, ...], counts: tuple[int, ...], timeout: float | None
) -> expert_pb2.ForwardRequest:
    """A call in the traces that are open here. timeout: see ExpertLink.forward."""
    request = expert_pb2.ForwardRequest(layer=layer, counts=counts, traceparents=traceparents())
    name_units(request, expert_ids)
    if timeout is not None:
        request.timeout_ms = max(1, int(timeout * 1000))
    return request


def make_reply(answer: Answer, rows_ND: torch.Tensor) -> ExpertReply:
    """What the worker says, as ExpertLink.forward does."""
    header, out_ND = answer
    if header.HasField("failure"):
        raise from_failure(header.failure)
    if out_ND is None or out_ND.shape != rows_ND.shape or out_ND.dtype != rows_ND.dtype:
        raise CorruptReply("the expert worker's answer does not have the shape of the request")
    return ExpertReply(out_ND, header.queue_ns / 1e9, header.compute_ns / 1e9, header.revision, header.batch_rows)
