"""Scripted Generation and Control services on a thread of their own: the text of the prompt says what they do."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from grokmoe.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    GrokmoeError,
    InternalError,
    InvalidRequest,
    NotFound,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from grokmoe.status import to_status
from grokmoe.v1 import control_pb2, control_pb2_grpc, expert_pb2, generation_pb2_grpc
from grokmoe.v1 import generation_pb2 as pb

SERVICE = "grokmoe.v1.Generation"
PIECES = (("Hel", (5, 6)), ("", (7,)), ("lo", (8,)))
"""What every candidate is, delta by delta; candidate i > 0 has its index after each text."""
VOCAB_SIZE = 512
USAGE = pb.Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=4)
TIMING = pb.Timing(queue_seconds=0.25, first_token_seconds=0.5, total_seconds=1.5)
MODEL = pb.GetModelResponse(
    name="tiny",
    config_hash="abc",
    vocab_size=VOCAB_SIZE,
    context_length=64,
    num_layers=2,
    num_experts=8,
    experts_per_token=2,
    hidden_size=32,
    eos_token_ids=[2, 9],
    has_tokenizer=True,
    dtype="float32",
    bos_token_id=1,
)
MOVE = control_pb2.ExpertMove(
    experts=[expert_pb2.ExpertRange(expert=1, layer_end=1)], to="e:1", phase="loading", **{"from": "e:0"}
)
STATUS = control_pb2.GetStatusResponse(
    workers=[
        control_pb2.Worker(
            role=control_pb2.WORKER_ROLE_ATTENTION,
            address="a:1",
            state=control_pb2.WORKER_STATE_READY,
            incarnation="i",
            device="cpu",
            num_pages=10,
            used_pages=4,
            cached_pages=3,
        ),
        control_pb2.Worker(
            role=control_pb2.WORKER_ROLE_EXPERT,
            index=1,
            address="e:1",
            state=control_pb2.WORKER_STATE_SUSPECT,
            experts=[0, 1],
            held=[
                expert_pb2.ExpertRange(expert=0, layer_end=2),
                expert_pb2.ExpertRange(expert=1, layer_begin=1, layer_end=2),
            ],
            loading=[expert_pb2.ExpertRange(expert=1, layer_end=1)],
            rows_per_second=12.5,
        ),
        control_pb2.Worker(
            role=control_pb2.WORKER_ROLE_ATTENTION,
            index=1,
            address="p:1+q:1",
            state=control_pb2.WORKER_STATE_READY,
            num_pages=20,
            stages=[
                control_pb2.PipelineStage(address="q:1", layer_end=1, device="cpu", incarnation="j"),
                control_pb2.PipelineStage(address="p:1", layer_begin=1, layer_end=2, device="cuda:0", incarnation="k"),
            ],
        ),
        control_pb2.Worker(role=77, state=78),  # from a newer server
    ],
    placement=[control_pb2.ExpertPlacement(expert=1, workers=[1, 0], rows=99, layer_rows=[90, 9])],
    waiting=1,
    running=2,
    steps=3,
    preemptions=4,
    legs=[control_pb2.LegLatency(leg="wire", total_seconds=0.5, count=6)],
    placement_version=7,
    imbalance=1.5,
    moves=[MOVE],
)
ERRORS: dict[str, GrokmoeError] = {
    "invalid": InvalidRequest("sampling.top_p", "1.5 is not in (0, 1]"),
    "conflict": InvalidRequest("structured", "not with ignore_eos", reason=Reason.CONFLICTING_FIELDS),
    "missing": NotFound("no such model"),
    "twice": AlreadyExists("this request is alive"),
    "full": ResourceExhausted("queue full", retry_after=2.5, reason=Reason.QUEUE_FULL),
    "precondition": FailedPrecondition("another incarnation"),
    "away": Unavailable("an expert is missing", retry_after=0.5),
    "late": DeadlineExceeded("too late"),
    "cancelled": Cancelled("given up"),
    "bug": InternalError("a bug"),
}


def logprobs_of(token_ids: Sequence[int], count: int | None) -> list[pb.TokenLogprobs]:
    """Made up: the token drawn is the second of those asked for."""
    if count is None:
        return []
    made = []
    for token_id in token_ids:
        message = pb.TokenLogprobs(token_id=token_id, logprob=-1.5, rank=2)
        if count < 0:
            message.top_logprobs.extend(-0.25 * id_ for id_ in range(VOCAB_SIZE))
        else:
            message.top_token_ids.extend(range(100, 100 + count))
            message.top_logprobs.extend(-1.0 - place for place in range(count))
        made.append(message)
    return made


def prompt_logprobs_of(token_ids: Sequence[int], count: int | None) -> list[pb.TokenLogprobs]:
    """As above; nothing precedes the first."""
    made = logprobs_of(token_ids, count)
    for message in made[:1]:
        message.Clear()
        message.token_id = token_ids[0]
    return made


def optional(message: Any, name: str) -> Any:
    """A field's value, None if it is unset."""
    return getattr(message, name) if message.HasField(name) else None


class FakeGeneration(generation_pb2_grpc.GenerationServicer, control_pb2_grpc.ControlServicer):
    """Records what arrives. `cancelled` is set when a call that would run for ever is cancelled.

    failures: what the next calls end with, one each, before anything else happens: an error of ours, or a gRPC code
        without details.
    """

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.deadlines: list[float] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.times: list[float] = []
        self.failures: list[GrokmoeError | grpc.StatusCode] = []
        self.running = threading.Event()
        self.cancelled = threading.Event()

    async def _begin(self, request: Any, context: Any) -> None:
        self.times.append(time.monotonic())
        self.requests.append(request)
        self.deadlines.append(context.time_remaining())
        self.metadata.append(dict(context.invocation_metadata()))
        failure = self.failures.pop(0) if self.failures else None
        if isinstance(failure, GrokmoeError):
            await context.abort_with_status(to_status(failure))
        elif failure is not None:
            await context.abort(failure, "scripted")
        text = getattr(request, "text", "")
        if text in ERRORS:
            await context.abort_with_status(to_status(ERRORS[text]))
        if text == "data loss":
            await context.abort(grpc.StatusCode.DATA_LOSS, "where is it")

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
        reason = {"no reason": 0, "new reason": 9, "aborted": pb.FINISH_REASON_ABORTED}.get(
            request.text, pb.FINISH_REASON_STOP
        )
        token_ids = [token_id for _, token_ids in PIECES for token_id in token_ids]
        return pb.GenerateResponse(
            request_id=request.request_id or "drawn",
            candidates=[
                pb.Candidate(
                    index=index,
                    text="".join(piece_of(text, index) for text, _ in PIECES),
                    token_ids=token_ids,
                    logprobs=logprobs_of(token_ids, optional(request.response, "logprobs")),
                    finish_reason=reason,
                    **stopped_by(request),
                )
                for index in range(0 if request.text == "no candidate" else request.sampling.n or 1)
            ],
            prompt_logprobs=prompt_logprobs_of([3, 4], optional(request.response, "prompt_logprobs")),
            usage=USAGE,
            timing=TIMING,
        )

    async def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        await self._begin(request.generate, context)
        text = request.generate.text
        n = request.generate.sampling.n or 1
        count = 0
        for piece, token_ids in PIECES:
            count += len(token_ids)
            is_last = count == USAGE.completion_tokens and text != "no reason"
            for index in range(n):
                message = pb.StreamGenerateResponse(
                    request_id=request.generate.request_id or "drawn",
                    index=index,
                    text_delta=piece_of(piece, index),
                    token_ids=token_ids,
                    logprobs=logprobs_of(token_ids, optional(request.generate.response, "logprobs")),
                    usage=pb.Usage(prompt_tokens=3, cached_tokens=2, completion_tokens=count),
                )
                if piece == PIECES[0][0] and index == 0:
                    asked = optional(request.generate.response, "prompt_logprobs")
                    message.prompt_logprobs.extend(prompt_logprobs_of([3, 4], asked))
                if is_last:
                    message.finish_reason = pb.FINISH_REASON_STOP if n > 1 else pb.FINISH_REASON_LENGTH
                    message.MergeFrom(pb.StreamGenerateResponse(**stopped_by(request.generate)))
                    if index == n - 1:
                        message.timing.CopyFrom(TIMING)
                if text == "another candidate":
                    message.index = 7
                yield message
            if text == "breaks":
                await context.abort_with_status(to_status(ERRORS["away"]))
            if text == "forever":
                await self._run_for_ever()
        if text == "goes on":
            yield message

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        await self._begin(request, context)
        token_ids = list(request.token_ids.ids) or list(request.text.encode())
        return pb.ScoreResponse(
            request_id=request.request_id or "drawn",
            logprobs=prompt_logprobs_of(token_ids, request.top_logprobs),
            total_logprob=-1.5 * (len(token_ids) - 1),
            usage=USAGE,
            timing=TIMING,
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        await self._begin(request, context)
        return pb.TokenizeResponse(token_ids=list(request.text.encode()), pieces=list(request.text))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        await self._begin(request, context)
        return pb.DetokenizeResponse(text=bytes(request.token_ids).decode())

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        await self._begin(request, context)
        return MODEL

    async def GetStatus(self, request: control_pb2.GetStatusRequest, context: Any) -> control_pb2.GetStatusResponse:
        await self._begin(request, context)
        return STATUS

    async def Abort(self, request: control_pb2.AbortRequest, context: Any) -> control_pb2.AbortResponse:
        await self._begin(request, context)
        return control_pb2.AbortResponse(aborted_ids=[id_ for id_ in request.request_ids if id_.startswith("alive")])

    async def MoveExperts(
        self, request: control_pb2.MoveExpertsRequest, context: Any
    ) -> control_pb2.MoveExpertsResponse:
        await self._begin(request, context)
        return control_pb2.MoveExpertsResponse(
            loaded_bytes=1000, load_seconds=1.5, drain_seconds=0.25, placement_version=8
        )

    async def RebalanceExperts(
        self, request: control_pb2.RebalanceExpertsRequest, context: Any
    ) -> control_pb2.RebalanceExpertsResponse:
        await self._begin(request, context)
        return control_pb2.RebalanceExpertsResponse(
            moves=[MOVE],
            imbalance=2.0,
            forecast_imbalance=1.0,
            gain_seconds=30.0,
            cost_seconds=4.0,
            done=request.force,
            reason="" if request.force else "not asked to",
        )


def piece_of(text: str, index: int) -> str:
    """A candidate's own text of a piece."""
    return f"{text}{index or ''}"


def stopped_by(request: pb.GenerateRequest) -> dict[str, Any]:
    """The first stop string or stop token id of the request, if it has one."""
    if request.stopping.stop_strings:
        return {"stop_string": request.stopping.stop_strings[0]}
    if request.stopping.stop_token_ids:
        return {"stop_token_id": request.stopping.stop_token_ids[0]}
    return {}


class FakeServer:
    """Serves a FakeGeneration while its `with` block runs.

    address: where, with port 0 for any. credentials: for TLS.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:0",
        serving: bool = True,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.generation = FakeGeneration()
        self.address = address
        self._serving = serving
        self._credentials = credentials
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="fake-server")

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        generation_pb2_grpc.add_GenerationServicer_to_server(self.generation, server)
        control_pb2_grpc.add_ControlServicer_to_server(self.generation, server)
        await self._set_serving(self._serving)
        if self._credentials is None:
            port = server.add_insecure_port(self.address)
        else:
            port = server.add_secure_port(self.address, self._credentials)
        if not self.address.startswith("unix:"):
            self.address = f"{self.address.rpartition(':')[0]}:{port}"
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
