"""A scripted Generation service on a thread of its own: the text of the prompt says what it does."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterator
from typing import Any, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from grokmoe.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    GrokmoeError,
    InternalError,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from grokmoe.status import to_status
from grokmoe.v1 import generation_pb2 as pb
from grokmoe.v1 import generation_pb2_grpc

SERVICE = "grokmoe.v1.Generation"
PIECES = (("Hel", (5, 6)), ("", (7,)), ("lo", (8,)))
USAGE = pb.Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=4)
TIMING = pb.Timing(queue_seconds=0.25, first_token_seconds=0.5, total_seconds=1.5)
MODEL = pb.GetModelResponse(
    name="tiny",
    config_hash="abc",
    vocab_size=512,
    context_length=64,
    num_layers=2,
    num_experts=8,
    experts_per_token=2,
    hidden_size=32,
    eos_token_ids=[2, 9],
    has_tokenizer=True,
    dtype="float32",
)
STATUS = pb.GetStatusResponse(
    workers=[
        pb.Worker(
            role=pb.WORKER_ROLE_ATTENTION,
            address="a:1",
            state=pb.WORKER_STATE_READY,
            incarnation="i",
            device="cpu",
            num_pages=10,
            used_pages=4,
            cached_pages=3,
        ),
        pb.Worker(role=pb.WORKER_ROLE_EXPERT, index=1, address="e:1", state=pb.WORKER_STATE_SUSPECT, experts=[0, 1]),
        pb.Worker(role=77, state=78),  # from a newer server
    ],
    placement=[pb.ExpertPlacement(expert=1, workers=[1, 0], rows=99)],
    waiting=1,
    running=2,
    steps=3,
    preemptions=4,
    legs=[pb.LegLatency(leg="wire", total_seconds=0.5, count=6)],
)
ERRORS: dict[str, GrokmoeError] = {
    "invalid": InvalidRequest("sampling.top_p", "1.5 is not in (0, 1]"),
    "missing": NotFound("no such model"),
    "full": ResourceExhausted("queue full", retry_after=2.5),
    "precondition": FailedPrecondition("another incarnation"),
    "away": Unavailable("an expert is missing", retry_after=0.5),
    "late": DeadlineExceeded("too late"),
    "cancelled": Cancelled("given up"),
    "bug": InternalError("a bug"),
}


class FakeGeneration(generation_pb2_grpc.GenerationServicer):
    """Records what arrives. `cancelled` is set when a call that would run for ever is cancelled."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.deadlines: list[float] = []
        self.running = threading.Event()
        self.cancelled = threading.Event()

    async def _begin(self, request: pb.GenerateRequest, context: Any) -> None:
        self.requests.append(request)
        self.deadlines.append(context.time_remaining())
        if request.text in ERRORS:
            await context.abort_with_status(to_status(ERRORS[request.text]))
        if request.text == "unauthenticated":
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you")

    async def _run_for_ever(self) -> None:
        self.running.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        await self._begin(request, context)
        if request.text == "forever":
            await self._run_for_ever()
        reason = {"no reason": 0, "new reason": 9}.get(request.text, pb.FINISH_REASON_STOP)
        return pb.GenerateResponse(
            request_id=request.request_id or "drawn",
            text="".join(text for text, _ in PIECES),
            token_ids=[token_id for _, token_ids in PIECES for token_id in token_ids],
            finish_reason=reason,
            usage=USAGE,
            timing=TIMING,
        )

    async def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        await self._begin(request.generate, context)
        text = request.generate.text
        request_id = request.generate.request_id or "drawn"
        count = 0
        for piece, token_ids in PIECES:
            count += len(token_ids)
            usage = pb.Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=count)
            message = pb.StreamGenerateResponse(
                request_id=request_id, text_delta=piece, token_ids=token_ids, usage=usage
            )
            if count == USAGE.completion_tokens and text != "no reason":
                message.finish_reason = pb.FINISH_REASON_LENGTH
                message.timing.CopyFrom(TIMING)
            yield message
            if text == "breaks":
                await context.abort_with_status(to_status(ERRORS["away"]))
            if text == "forever":
                await self._run_for_ever()

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        return MODEL

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        return STATUS


class FakeServer:
    """Serves a FakeGeneration while its `with` block runs. address: where, with port 0 for any."""

    def __init__(self, address: str = "127.0.0.1:0", serving: bool = True) -> None:
        self.generation = FakeGeneration()
        self.address = address
        self._serving = serving
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="fake-server")

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        generation_pb2_grpc.add_GenerationServicer_to_server(self.generation, server)
        await self._set_serving(self._serving)
        port = server.add_insecure_port(self.address)
        if not self.address.startswith("unix:"):
            self.address = f"127.0.0.1:{port}"
        await server.start()
        self._started.set_result(None)
        await self._stop.wait()
        await server.stop(None)

    async def _set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        await self._health.set(SERVICE, status.SERVING if serving else status.NOT_SERVING)

    def set_serving(self, serving: bool) -> None:
        """From any thread."""
        asyncio.run_coroutine_threadsafe(self._set_serving(serving), self._loop).result()

    def stop(self) -> None:
        """Breaks all calls off."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.result(timeout=10)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
