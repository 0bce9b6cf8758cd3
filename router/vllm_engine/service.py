"""vllm.grpc.engine.VllmEngine: decodes, hands over to the same service that answers grokmoe.v1.Generation, encodes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from grokmoe.access import Scope
from grokmoe.authentication import has_scope
from grokmoe.errors import InvalidRequest
from grokmoe.server import Service, server_stream, unary
from router.call_context import read_call
from router.engine import Engine
from router.service import GenerationService
from router.vllm_engine import info
from router.vllm_engine.info import ServedModel
from router.vllm_engine.request import their_error, to_generate_request
from router.vllm_engine.response import ResponseWriter
from router.vllm_engine.tokenizer_bundle import bundle, in_chunks

SERVICE = "vllm.grpc.engine.VllmEngine"

MAX_ABORTED = 1024
"""Ids in one Abort. A message of the largest size could name two million, and hold up the event loop for a second."""

FLUSH_INTERVAL = 0.02
"""Pause between two looks whether the engine is idle, seconds."""

NOT_THERE = {
    "Embed": "this model generates text and has no embeddings",
    "StartProfile": "there is no profiler to start by a call",
    "StopProfile": "there is no profiler to stop by a call",
    "SubscribeKvEvents": "events of the KV cache are not published",
}
"""Methods that are refused, and why."""


class VllmEngine:
    """Translates between vLLM's messages and our service. Ids of requests are the caller's and mean nothing here."""

    def __init__(self, generation: GenerationService, engine: Engine, model: ServedModel) -> None:
        self._generation, self._engine, self._model = generation, engine, model
        self._started = time.monotonic()
        self._last_received = 0.0

    def as_service(self) -> Service:
        """What a server registers."""
        handlers = {
            "Generate": server_stream(self.Generate, vllm.GenerateRequest, vllm.GenerateResponse),
            "Abort": unary(self.Abort, vllm.AbortRequest, vllm.AbortResponse),
            "HealthCheck": unary(self.HealthCheck, vllm.HealthCheckRequest, vllm.HealthCheckResponse),
            "GetModelInfo": unary(self.GetModelInfo, vllm.GetModelInfoRequest, vllm.GetModelInfoResponse),
            "GetServerInfo": unary(self.GetServerInfo, vllm.GetServerInfoRequest, vllm.GetServerInfoResponse),
            "GetLoads": unary(self.GetLoads, vllm.GetLoadsRequest, vllm.GetLoadsResponse),
            "GetTokenizer": server_stream(self.GetTokenizer, common.GetTokenizerRequest, common.GetTokenizerChunk),
            "FlushCache": unary(self.FlushCache, common.FlushCacheRequest, common.FlushCacheResponse),
        }
        described = vllm.DESCRIPTOR.services_by_name["VllmEngine"].methods_by_name
        for name, why in NOT_THERE.items():
            if name in described:
                handlers[name] = _refusing(name, why, described[name].server_streaming)
        return Service(SERVICE, handlers, method_scopes={"FlushCache": Scope.CONTROL}, admit=self._generation.admit)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Of a stream chunks and a `complete` per candidate, else the latter only. A caller who leaves frees it."""
        self._last_received = time.time()
        writer = ResponseWriter(request)
        try:
            ours = to_generate_request(request, self._longest)
            async with contextlib.aclosing(self._generation.stream(ours, read_call(context))) as parts:
                async for part in parts:
                    for message in writer.write(part):
                        yield message
        except InvalidRequest as error:
            raise their_error(error) from error
        for message in writer.finish():
            yield message

    async def Abort(self, request: Any, context: Any) -> Any:
        """Ends those of the requests that are alive and the caller's own; with the scope `control`, whosever they are.

        Gateways send it for a client that has gone. The id of another's request is answered as one that nobody has.
        """
        if len(request.request_ids) > MAX_ABORTED:
            raise InvalidRequest("request_ids", f"holds {len(request.request_ids)} ids, limit is {MAX_ABORTED}")
        caller = None if has_scope(Scope.CONTROL) else read_call(context).caller
        for request_id in request.request_ids:
            self._generation.abort(request_id, caller)
        return vllm.AbortResponse()

    async def HealthCheck(self, request: Any, context: Any) -> Any:
        """Whether there is somebody to work."""
        return info.health(self._engine)

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        """What is served."""
        return info.model_info(self._model, self._engine)

    async def GetServerInfo(self, request: Any, context: Any) -> Any:
        """How it is served."""
        return info.server_info(self._model, self._engine, time.monotonic() - self._started, self._last_received)

    async def GetLoads(self, request: Any, context: Any) -> Any:
        """How much there is to do. All is one rank, and there is one section, so nothing is left to choose."""
        if request.dp_rank != 0:
            raise InvalidRequest("dp_rank", f"is {request.dp_rank}, there is rank 0 only")
        return info.loads(self._engine)

    async def GetTokenizer(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """The tokenizer files as a zip archive in pieces."""
        data = await asyncio.to_thread(bundle, self._model.directory)
        for piece, digest in in_chunks(data):
            yield common.GetTokenizerChunk(data=piece, sha256=digest)

    async def FlushCache(self, request: Any, context: Any) -> Any:
        """Forgets the prefixes that could be reused, once no request is alive. Waits for that as long as asked."""
        deadline = time.monotonic() + request.timeout_s
        while not self._is_idle:
            if not time.monotonic() < deadline:  # also when asked to wait for a time that is no number
                alive = self._engine.num_running + self._engine.num_waiting
                return common.FlushCacheResponse(message=f"{alive} sequences are alive, nothing was flushed")
            await asyncio.sleep(FLUSH_INTERVAL)
        ledgers = self._ledgers
        num_cached = sum(ledger.num_cached for ledger in ledgers)
        for ledger in ledgers:
            ledger.reset()
        return common.FlushCacheResponse(success=True, message=f"{num_cached} pages flushed")

    @property
    def _ledgers(self) -> list[Any]:
        return [cell.scheduler.ledger for cell in self._engine.cells if cell.info is not None]

    @property
    def _is_idle(self) -> bool:
        """No sequence lists a page, and none is about to: the ledgers may forget all they know."""
        alive = self._engine.num_running + self._engine.num_waiting
        return not alive and not any(ledger.num_used for ledger in self._ledgers)

    @property
    def _longest(self) -> int:
        """Most tokens that a sequence can have, in the context and in the KV pages."""
        lengths = [cell.scheduler.max_sequence_tokens for cell in self._engine.cells if cell.info is not None]
        return max(lengths, default=self._engine.config.context_length)


def _refusing(name: str, why: str, is_stream: bool) -> Any:
    async def refuse(request: bytes, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name} is not supported: {why}")

    if is_stream:
        return grpc.unary_stream_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)
