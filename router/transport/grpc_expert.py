"""An expert worker behind gRPC. Letters: N rows, D hidden."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc
import torch

from grokmoe import tensors
from grokmoe.channel import RECONNECT_OPTIONS, open_channel
from grokmoe.errors import GrokmoeError, Unavailable
from grokmoe.status import from_failure
from grokmoe.v1 import expert_pb2
from router.transport.base import ExpertInfo, ExpertReply
from router.transport.grpc_stream import ANY_ROWS, Stream, describe

SERVICE = "grokmoe.v1.Expert"

EXPERT_CALL_TIMEOUT = 60.0
"""Seconds after which an expert call counts as lost."""


class _ExpertStream:
    """One lane to one expert worker: requests out in order, responses matched by id."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stream = Stream(channel, f"/{SERVICE}/Forward")
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
        reply = await describe(
            self._channel, SERVICE, expert_pb2.ExpertDescribeRequest(), expert_pb2.ExpertDescribeResponse
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
