"""Workers behind gRPC: long-lived bidirectional streams, one per worker and lane, undecoded bytes both ways.

A stream that fails is thrown away and opened anew by the next call on its lane.

Letters: T tokens, N rows, D hidden.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import grpc
import torch

from grokmoe import tensors
from grokmoe.channel import RECONNECT_OPTIONS, TIMEOUTS, open_channel
from grokmoe.errors import FailedPrecondition, GrokmoeError, InternalError, InvalidRequest, Unavailable
from grokmoe.plan_codec import plan_to_proto, result_from_proto
from grokmoe.status import from_failure, from_rpc_error
from grokmoe.step_plan import StepPlan, StepResult
from grokmoe.v1 import attention_pb2, expert_pb2
from router.legs import Legs
from router.transport.base import AttentionInfo, ExpertInfo, ExpertReply, Hole

ATTENTION_SERVICE = "grokmoe.v1.Attention"
EXPERT_SERVICE = "grokmoe.v1.Expert"

EXPERT_CALL_TIMEOUT = 60.0
"""Seconds after which an expert call counts as lost."""

HOLE_TIMEOUT = 120.0
"""Seconds an attention worker may take between two messages of a step."""

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]

ANY_ROWS = 1 << 31
"""Workers are trusted with the size of their answers: it follows from what they were asked."""


class _Stream:
    """One open stream: whole messages in, whole messages out, errors as errors of our tree."""

    def __init__(self, channel: grpc.aio.Channel, method: str) -> None:
        untyped: Any = channel  # grpc-stubs knows neither raw bytes nor the read/write style
        self._call: Any = untyped.stream_stream(method)()

    async def write(self, messages: Iterable[bytes]) -> None:
        try:
            for message in messages:
                await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise await self._why(error) from error

    async def read(self) -> bytes:
        try:
            data = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise await self._why(error) from error
        if data is _EOF:
            raise await self._why(None)
        return bytes(data)

    async def _why(self, error: Exception | None) -> GrokmoeError:
        """The stream has ended. That is a lost worker, whatever the status, unless it says that we are at fault."""
        if isinstance(error, grpc.aio.AioRpcError):
            why = from_rpc_error(error)
            is_ours = isinstance(why, InvalidRequest | FailedPrecondition | Unavailable)
            return why if is_ours else Unavailable(f"the worker ended the stream: {why.message}")
        code, details = await self._call.code(), await self._call.details()
        if code in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
            return Unavailable("the worker ended the stream")
        return Unavailable(f"the worker ended the stream: {code.name}: {details}")

    def cancel(self) -> None:
        self._call.cancel()


async def _describe(channel: grpc.aio.Channel, service: str, request: Any, response: Any) -> Any:
    call = channel.unary_unary(f"/{service}/Describe", request.SerializeToString, response.FromString)
    try:
        return await call(request, timeout=TIMEOUTS.describe)
    except grpc.aio.AioRpcError as error:
        raise Unavailable(f"{error.code().name}: {error.details()}") from error


class GrpcAttentionLink:
    """An attention worker at an address."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = open_channel(address, RECONNECT_OPTIONS)
        self._lanes: dict[int, _Stream] = {}
        self._next_step = 0

    async def describe(self) -> AttentionInfo:
        """See AttentionLink."""
        reply = await _describe(
            self._channel,
            ATTENTION_SERVICE,
            attention_pb2.AttentionDescribeRequest(),
            attention_pb2.AttentionDescribeResponse,
        )
        return AttentionInfo(
            config_hash=reply.config_hash,
            incarnation=reply.incarnation,
            dtype=tensors.torch_dtype(reply.dtype),
            layer_begin=reply.layer_begin,
            layer_end=reply.layer_end,
            num_pages=reply.num_pages,
            page_size=reply.page_size,
            max_step_tokens=reply.max_step_tokens,
            device=reply.device,
        )

    async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
        """See AttentionLink."""
        stream = self._lanes.get(lane)
        if stream is None:
            stream = self._lanes[lane] = _Stream(self._channel, f"/{ATTENTION_SERVICE}/Step")
        self._next_step += 1
        try:
            return await self._drive(stream, self._next_step, plan, hole, legs)
        except BaseException:
            # The worker may be in the middle of the step: only a new stream starts from a known state.
            self._lanes.pop(lane, None)
            stream.cancel()
            raise

    async def _drive(self, stream: _Stream, step_id: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
        rows: tensors.RowAssembler[attention_pb2.StepResponse] = tensors.RowAssembler(
            attention_pb2.StepResponse, "step_id", ANY_ROWS
        )
        begin = time.perf_counter()
        await stream.write([tensors.encode(attention_pb2.StepRequest(step_id=step_id, plan=plan_to_proto(plan)))])
        while True:
            message = None
            while message is None:
                try:
                    async with asyncio.timeout(HOLE_TIMEOUT):
                        message = rows.add(await stream.read())
                except TimeoutError:
                    raise Unavailable(f"no message from the attention worker for {HOLE_TIMEOUT:g} s") from None
            header, payload = message
            compute = header.compute_ns / 1e9
            legs.add("attention", compute)
            legs.add("wire", max(0.0, time.perf_counter() - begin - compute))
            if header.HasField("failure"):
                raise from_failure(header.failure)
            if header.HasField("result"):
                return result_from_proto(header.result, payload)
            if payload is None:
                raise InternalError("the attention worker sent neither a MoE input nor a result")
            out_TD = await hole.fill(header.layer, payload)
            begin = time.perf_counter()
            reply = attention_pb2.StepRequest(step_id=step_id, layer=header.layer)
            await stream.write(tensors.encode_rows(reply, out_TD, "step_id"))

    async def close(self) -> None:
        """See AttentionLink."""
        for stream in self._lanes.values():
            stream.cancel()
        await self._channel.close(None)


class _ExpertStream:
    """One lane to one expert worker: requests out in order, responses matched by id."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stream = _Stream(channel, f"/{EXPERT_SERVICE}/Forward")
        self._waiting: dict[int, asyncio.Future[tuple[expert_pb2.ForwardResponse, torch.Tensor | None]]] = {}
        self._next_id = 0
        self._writing = asyncio.Lock()
        self.error: Unavailable | None = None
        self._reader = asyncio.ensure_future(self._read())

    async def call(
        self, request: expert_pb2.ForwardRequest, rows_ND: torch.Tensor
    ) -> tuple[expert_pb2.ForwardResponse, torch.Tensor | None]:
        self._next_id += 1
        request.request_id = self._next_id
        future: asyncio.Future[tuple[expert_pb2.ForwardResponse, torch.Tensor | None]]
        future = asyncio.get_running_loop().create_future()
        self._waiting[request.request_id] = future
        try:
            async with self._writing:
                await self._write(request.request_id, tensors.encode_rows(request, rows_ND, "request_id"))
            return await future
        finally:
            self._waiting.pop(request.request_id, None)

    async def _write(self, request_id: int, messages: Iterable[bytes]) -> None:
        try:
            await self._stream.write(messages)
        except BaseException as error:
            del self._waiting[request_id]  # who writes it has the error from here
            if isinstance(error, GrokmoeError):
                raise self._end(error) from error
            # gRPC cancels a call when one of its writes is cancelled, such as by a time-out.
            self._end(Unavailable("a write was cancelled"))
            raise

    async def _read(self) -> None:
        rows: tensors.RowAssembler[expert_pb2.ForwardResponse] = tensors.RowAssembler(
            expert_pb2.ForwardResponse, "request_id", ANY_ROWS
        )
        try:
            while True:
                message = rows.add(await self._stream.read())
                if message is not None:
                    future = self._waiting.get(message[0].request_id)
                    if future is not None and not future.done():  # else: nobody waits for this answer any more
                        future.set_result(message)
        except GrokmoeError as error:
            self._end(error)
        finally:
            self._end(Unavailable("the stream was closed"))

    def _end(self, error: GrokmoeError) -> Unavailable:
        """Fails all calls. The first error is the one that counts; for callers it is always a lost worker."""
        if self.error is None:
            self.error = error if isinstance(error, Unavailable) else Unavailable(error.message)
            self._stream.cancel()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(self.error)
        return self.error

    def cancel(self) -> None:
        self._reader.cancel()
        self._stream.cancel()


class GrpcExpertLink:
    """An expert worker at an address."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = open_channel(address, RECONNECT_OPTIONS)
        self._lanes: dict[int, _ExpertStream] = {}

    async def describe(self) -> ExpertInfo:
        """See ExpertLink."""
        reply = await _describe(
            self._channel, EXPERT_SERVICE, expert_pb2.ExpertDescribeRequest(), expert_pb2.ExpertDescribeResponse
        )
        return ExpertInfo(
            config_hash=reply.config_hash,
            incarnation=reply.incarnation,
            dtype=tensors.torch_dtype(reply.dtype),
            experts=tuple((held.expert, held.layer_begin, held.layer_end) for held in reply.experts),
            max_rows=reply.max_rows,
            device=reply.device,
        )

    async def forward(
        self, lane: int, layer: int, expert_ids: tuple[int, ...], counts: tuple[int, ...], rows_ND: torch.Tensor
    ) -> ExpertReply:
        """See ExpertLink."""
        stream = self._lanes.get(lane)
        if stream is None or stream.error is not None:
            stream = self._lanes[lane] = _ExpertStream(self._channel)
        request = expert_pb2.ForwardRequest(layer=layer, expert_ids=expert_ids, counts=counts)
        try:
            async with asyncio.timeout(EXPERT_CALL_TIMEOUT):
                header, out_ND = await stream.call(request, rows_ND)
        except TimeoutError:
            # What the worker still owes would stand before everything sent later.
            self._lanes.pop(lane, None)
            stream.cancel()
            raise Unavailable(f"no answer from the expert worker for {EXPERT_CALL_TIMEOUT:g} s") from None
        if header.HasField("failure"):
            raise from_failure(header.failure)
        if out_ND is None or out_ND.shape != rows_ND.shape or out_ND.dtype != rows_ND.dtype:
            raise Unavailable("the expert worker's answer does not have the shape of the request")
        return ExpertReply(out_ND, header.queue_ns / 1e9, header.compute_ns / 1e9)

    async def close(self) -> None:
        """See ExpertLink."""
        for stream in self._lanes.values():
            stream.cancel()
        await self._channel.close(None)
