"""grokmoe.v1.Generation: decodes, validates, submits to the engine, encodes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from grokmoe.errors import Code, GrokmoeError
from grokmoe.server import Service, unary, written_stream
from grokmoe.tokenizer import Tokenizer
from grokmoe.v1 import generation_pb2 as pb
from router import status
from router.admission import CallContext
from router.answer import Answer, Part, collect, timing, trailing_metadata
from router.call_context import read_call
from router.engine import Engine
from router.generation import NOBODY, Generation
from router.logprobs import prompt_to_messages
from router.outbox import Outbox
from router.request_log import RequestLog
from router.request_metrics import observe_end
from router.stream_writer import StreamWriter
from router.structured import GrammarCompiler
from router.validation import Accepted, PromptReader, RequestReader

SERVICE = "grokmoe.v1.Generation"

QUEUED = frozenset({"Generate", "StreamGenerate", "Score"})
"""Methods whose calls wait for a step."""


def _label(reason: pb.FinishReason) -> str:
    return pb.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()


@dataclasses.dataclass
class _Outcome:
    """How a request ended: a finish reason or the name of a gRPC code. generation: None: it was refused before."""

    label: str = Code.CANCELLED.name
    generation: Generation | None = None


class GenerationService:
    """Translates between messages and the engine."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        model_name: str,
        dtype: str,
        refuses_control_symbols: bool = False,
        logs_requests: bool = False,
    ) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._log = RequestLog(engine, logs_requests)
        self._model_name, self._dtype = model_name, dtype
        config = engine.config
        compiler = None
        if tokenizer is not None:
            compiler = GrammarCompiler(tokenizer, config.vocab_size, config.eos_token_ids)
        self._alive: dict[str, Generation] = {}
        self._outbox = Outbox()
        self._prompts = PromptReader(config, tokenizer, refuses_control_symbols)
        self._requests = RequestReader(config, self._prompts, compiler, engine.adapters.table)

    def as_service(self) -> Service:
        """What a server registers."""
        return Service(
            SERVICE,
            {
                "Generate": unary(self.Generate, pb.GenerateRequest, pb.GenerateResponse),
                "StreamGenerate": written_stream(self.StreamGenerate, pb.StreamGenerateRequest),
                "Score": unary(self.Score, pb.ScoreRequest, pb.ScoreResponse),
                "Tokenize": unary(self.Tokenize, pb.TokenizeRequest, pb.TokenizeResponse),
                "Detokenize": unary(self.Detokenize, pb.DetokenizeRequest, pb.DetokenizeResponse),
                "GetModel": unary(self.GetModel, pb.GetModelRequest, pb.GetModelResponse),
            },
            admit=self.admit,
        )

    def admit(self, method: str) -> None:
        """Refuses what would wait behind a full queue before it is read. Raises ResourceExhausted.

        Who calls does not matter for that; the bounds that depend on caller and prompt are looked at later.
        """
        if method in QUEUED and self._engine.num_waiting >= self._engine.admission.settings.max_waiting:
            with self._counted():
                self._engine.check_room(NOBODY)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        """Collects the stream."""
        async with contextlib.aclosing(self.stream(request, read_call(context), is_collected=True)) as parts:
            answer = collect([part async for part in parts], request.sampling.n or 1)
        context.set_trailing_metadata(trailing_metadata(answer.request_id, answer.timing))
        return answer

    async def StreamGenerate(self, request: pb.StreamGenerateRequest, context: Any) -> None:
        """One message per candidate and delivery: all its tokens that arrived since the last one."""
        async with self._answering(request.generate, read_call(context)) as (generation, answer, outcome):

            def made(part: Part) -> None:
                self._account(generation, part.index, part.num_tokens, part.finish_reason, outcome)
                if part.timing is not None:
                    context.set_trailing_metadata(trailing_metadata(generation.request.request_id, part.timing))

            delay = self._engine.metrics.delivery_time.observe
            await StreamWriter(context.write, generation, answer, self._outbox, made, delay).run()

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        """A prompt's log-probabilities; the prompt is computed and nothing drawn."""
        with self._counted() as outcome:
            call = read_call(context)
            self._engine.check_room(call)
            accepted = Accepted(await self._requests.score(request), None)
            with self._submitted(accepted, call, outcome) as generation:
                await generation.take()
                outcome.label = "scored"
                ids = accepted.request.prompt_ids
                rows = prompt_to_messages(ids[0], generation.prompt_logprobs())
                answer = pb.ScoreResponse(
                    request_id=accepted.request.request_id,
                    logprobs=rows,
                    total_logprob=sum(row.logprob for row in rows),
                    usage=pb.Usage(prompt_tokens=len(ids)),
                    timing=timing(generation),
                )
        context.set_trailing_metadata(trailing_metadata(answer.request_id, answer.timing))
        return answer

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Text to ids."""
        tokenizer = self._prompts.need_tokenizer("text")
        ids = await self._prompts.tokenize("text", request.text, "options", request.options)
        return pb.TokenizeResponse(token_ids=ids, pieces=tokenizer.pieces(ids))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        """Ids to text."""
        tokenizer = self._prompts.need_tokenizer("token_ids")
        self._prompts.check_ids("token_ids", request.token_ids)
        skip_special = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        return pb.DetokenizeResponse(text=tokenizer.decode(request.token_ids, skip_special=skip_special))

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        """What is served."""
        return status.model(self._engine, self._model_name, self._dtype, self._tokenizer is not None)

    async def stream(
        self, proto: pb.GenerateRequest, call: CallContext = NOBODY, is_collected: bool = False
    ) -> AsyncGenerator[pb.StreamGenerateResponse, None]:
        """The messages of one request. Closing it, also when the client has gone, frees what the request holds.

        is_collected: who reads them has no use for any before the last; then there are as few as can be.
        """
        async with self._answering(proto, call) as (generation, answer, outcome):
            if is_collected and not answer.has_stop_strings:
                generation.wait_for_end()
            while not answer.is_over:
                for delivery in await generation.take():
                    part = answer.add(delivery)
                    if part is not None:
                        self._account(generation, part.index, len(part.token_ids), part.finish_reason, outcome)
                        yield part

    def abort(self, request_id: str, caller: str | None = None) -> bool:
        """Ends a request by its id, see Engine.abort. caller: only if it is this one's; None: whosever it is."""
        generation = self._alive.get(request_id)
        if caller is not None and (generation is None or generation.call.caller != caller):
            return False
        return self._engine.abort(request_id)

    @contextlib.asynccontextmanager
    async def _answering(
        self, proto: pb.GenerateRequest, call: CallContext
    ) -> AsyncIterator[tuple[Generation, Answer, _Outcome]]:
        """A request from its check to its end."""
        with self._counted() as outcome:
            self._engine.check_room(call)  # before any work is done for it
            accepted = await self._requests.generate(proto)
            with self._submitted(accepted, call, outcome) as generation:
                yield generation, Answer(generation, self._tokenizer, accepted.text), outcome

    def _account(
        self, generation: Generation, index: int, num_tokens: int, reason: pb.FinishReason, outcome: _Outcome
    ) -> None:
        """A message has been made."""
        if reason:
            outcome.label = _label(reason)
            # After a stop string the engine does not know yet that the candidate is over.
            self._engine.cancel_candidate(generation, index)
        self._engine.metrics.generated_tokens.inc(num_tokens)

    @contextlib.contextmanager
    def _submitted(self, accepted: Accepted, call: CallContext, outcome: _Outcome) -> Iterator[Generation]:
        """The request in the engine; out of it at the end, so that a cancelled call does not cost another step."""
        generation = outcome.generation = self._engine.submit(accepted.request, call)
        self._log.begun(generation)
        request_id = accepted.request.request_id
        self._alive[request_id] = generation
        try:
            yield generation
        finally:
            if self._alive.get(request_id) is generation:  # the engine may have given its id to another by now
                del self._alive[request_id]
            self._engine.cancel(generation)
            observe_end(self._engine.metrics, generation)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[_Outcome]:
        """Counts the request by how it ended: what the block said last, or its error."""
        outcome = _Outcome()
        try:
            yield outcome
        except GrokmoeError as error:
            outcome.label = error.code.name
            raise
        except Exception:
            outcome.label = Code.INTERNAL.name
            raise
        finally:
            self._engine.metrics.requests.labels(outcome.label).inc()
            if outcome.generation is not None:
                self._log.ended(outcome.generation, outcome.label)
