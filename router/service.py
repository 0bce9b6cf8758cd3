"""grokmoe.v1.Generation: decodes, validates, submits to the engine, encodes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from grokmoe.errors import GrokmoeError
from grokmoe.server import Service, server_stream, unary
from grokmoe.tokenizer import IncrementalDecoder, Tokenizer
from grokmoe.v1 import generation_pb2 as pb
from router import status
from router.engine import Engine
from router.generation import Generation
from router.sequence import FinishReason
from router.validation import to_request

SERVICE = "grokmoe.v1.Generation"

_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class GenerationService:
    """Translates between messages and the engine."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, model_name: str, dtype: str) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._model_name, self._dtype = model_name, dtype

    def as_service(self) -> Service:
        """What a server registers."""
        return Service(
            SERVICE,
            {
                "Generate": unary(self.Generate, pb.GenerateRequest, pb.GenerateResponse),
                "StreamGenerate": server_stream(
                    self.StreamGenerate, pb.StreamGenerateRequest, pb.StreamGenerateResponse
                ),
                "GetModel": unary(self.GetModel, pb.GetModelRequest, pb.GetModelResponse),
                "GetStatus": unary(self.GetStatus, pb.GetStatusRequest, pb.GetStatusResponse),
            },
        )

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        """Collects the stream."""
        answer = pb.GenerateResponse()
        text = []
        async with contextlib.aclosing(self._generate(request)) as parts:
            async for part in parts:
                text.append(part.text_delta)
                answer.token_ids.extend(part.token_ids)
                last = part
        answer.request_id, answer.text, answer.finish_reason = last.request_id, "".join(text), last.finish_reason
        answer.usage.CopyFrom(last.usage)
        answer.timing.CopyFrom(last.timing)
        return answer

    async def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        """One message per delivery: all tokens that arrived since the last one."""
        async with contextlib.aclosing(self._generate(request.generate)) as parts:
            async for part in parts:
                yield part

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        """What is served."""
        return status.model(self._engine.config, self._model_name, self._dtype, self._tokenizer is not None)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        """The router's view of the cluster."""
        return status.cluster(self._engine)

    async def _generate(self, proto: pb.GenerateRequest) -> AsyncGenerator[pb.StreamGenerateResponse, None]:
        metrics = self._engine.metrics
        outcome = "CANCELLED"
        generation = None
        try:
            request = to_request(proto, self._engine.config, self._tokenizer)
            generation = self._engine.submit(request)
            decoder = IncrementalDecoder(self._tokenizer) if self._tokenizer else None
            finish_reason = None
            while finish_reason is None:
                token_ids, finish_reason = await generation.take()
                part = pb.StreamGenerateResponse(request_id=request.request_id, token_ids=token_ids)
                if decoder is not None:
                    part.text_delta = decoder.push(_visible(token_ids, finish_reason))
                    if finish_reason is not None:
                        part.text_delta += decoder.finish()
                self._account(part, generation, finish_reason)
                metrics.generated_tokens.inc(len(token_ids))
                yield part
            outcome = finish_reason.value
        except GrokmoeError as error:
            outcome = error.code.name
            raise
        except Exception:
            outcome = "INTERNAL"
            raise
        finally:
            # Also when the client has gone: a cancelled call must not cost another step.
            if generation is not None:
                self._engine.cancel(generation)
                _observe(metrics, generation)
            metrics.requests.labels(outcome).inc()

    def _account(
        self, part: pb.StreamGenerateResponse, generation: Generation, finish_reason: FinishReason | None
    ) -> None:
        sequence = generation.sequence
        part.usage.prompt_tokens = len(sequence.request.prompt_ids)
        part.usage.cached_tokens = sequence.num_cached_tokens
        part.usage.completion_tokens = sequence.num_outputs
        if finish_reason is None:
            return
        part.finish_reason = _FINISH[finish_reason]
        arrived, ended = generation.arrived, generation.ended_at or time.monotonic()
        part.timing.queue_seconds = (generation.scheduled_at or ended) - arrived
        part.timing.first_token_seconds = (generation.first_token_at or ended) - arrived
        part.timing.total_seconds = ended - arrived


def _visible(token_ids: list[int], finish_reason: FinishReason | None) -> list[int]:
    """The ids that become text: all but the one that ended generation."""
    return token_ids[:-1] if finish_reason is FinishReason.STOP else token_ids


def _observe(metrics: Any, generation: Generation) -> None:
    arrived = generation.arrived
    if generation.scheduled_at is not None:
        metrics.queue_time.observe(generation.scheduled_at - arrived)
    if generation.first_token_at is None:
        return
    metrics.time_to_first_token.observe(generation.first_token_at - arrived)
    num_later = generation.sequence.num_outputs - 1
    if generation.ended_at is not None and num_later > 0:
        metrics.time_per_output_token.observe((generation.ended_at - generation.first_token_at) / num_later)
