"""From the parts of our stream to the messages of vLLM's: chunks and one `complete` per candidate.

A chunk counts its own tokens only. `complete` has all of a candidate's ids and their number, also behind chunks;
log-probabilities that a chunk has told are not told again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from grokmoe.v1 import generation_pb2 as pb

FINISH_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORTED: "abort",
}


@dataclasses.dataclass
class _Candidate:
    """What is known of one candidate so far; knows_prompt: the prompt's log-probabilities have been sent with it."""

    index: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[pb.TokenLogprobs] = dataclasses.field(default_factory=list)
    last: pb.StreamGenerateResponse | None = None
    knows_prompt: bool = False


class ResponseWriter:
    """The answer to one request."""

    def __init__(self, request: Any) -> None:
        """request: the vllm.grpc.engine.GenerateRequest."""
        self._is_stream = request.stream
        self._stop_token_ids = frozenset(request.sampling_params.stop_token_ids)
        self._candidates: dict[int, _Candidate] = {}
        self._prompt_logprobs: Any = None

    def write(self, part: pb.StreamGenerateResponse) -> Iterator[Any]:
        """What to send for a part: of a stream a chunk, and `complete` when its candidate ends; else nothing yet."""
        if part.prompt_logprobs:
            self._prompt_logprobs = input_logprobs(part.prompt_logprobs)
        candidate = self._candidates.setdefault(part.index, _Candidate(part.index))
        candidate.token_ids.extend(part.token_ids)
        candidate.last = part
        if not self._is_stream:
            candidate.logprobs.extend(part.logprobs)
            return
        if part.token_ids:
            yield self._chunk(candidate, part)
        if part.finish_reason:
            yield self._complete(candidate)

    def finish(self) -> Iterator[Any]:
        """What to send after the last part: of an answer at once, all candidates in order."""
        if not self._is_stream:
            for _, candidate in sorted(self._candidates.items()):
                yield self._complete(candidate)

    def _chunk(self, candidate: _Candidate, part: pb.StreamGenerateResponse) -> Any:
        chunk = vllm.GenerateStreamChunk(
            token_ids=part.token_ids,
            prompt_tokens=part.usage.prompt_tokens,
            completion_tokens=len(part.token_ids),
            cached_tokens=part.usage.cached_tokens,
            output_logprobs=output_logprobs(part.logprobs),
            input_logprobs=self._prompt_logprobs_for(candidate),
            index=part.index,
        )
        return vllm.GenerateResponse(chunk=chunk)

    def _complete(self, candidate: _Candidate) -> Any:
        last = candidate.last
        assert last is not None, "a candidate without a part"
        complete = vllm.GenerateComplete(
            output_ids=candidate.token_ids,
            finish_reason=FINISH_REASONS[last.finish_reason],
            prompt_tokens=last.usage.prompt_tokens,
            completion_tokens=len(candidate.token_ids),
            cached_tokens=last.usage.cached_tokens,
            output_logprobs=output_logprobs(candidate.logprobs),
            input_logprobs=self._prompt_logprobs_for(candidate),
            index=candidate.index,
        )
        match last.WhichOneof("stopped_by"):
            case "stop_string":
                complete.matched_stop_str = last.stop_string
            case "stop_token_id" if last.stop_token_id in self._stop_token_ids:  # not the model's own end of text
                complete.matched_token_id = last.stop_token_id
        return vllm.GenerateResponse(complete=complete)

    def _prompt_logprobs_for(self, candidate: _Candidate) -> Any:
        """Once per candidate, as soon as they are known: another candidate may be faster than the one that has them."""
        if candidate.knows_prompt or self._prompt_logprobs is None:
            return None
        candidate.knows_prompt = True
        return self._prompt_logprobs


def output_logprobs(tokens: Iterable[pb.TokenLogprobs]) -> Any:
    """Log-probabilities of drawn tokens; None of none."""
    told = vllm.OutputLogProbs()
    for token in tokens:
        told.token_ids.append(token.token_id)
        told.token_logprobs.append(token.logprob)
        if token.top_logprobs:
            told.top_logprobs.append(_top(token))
    return told if told.token_ids else None


def input_logprobs(tokens: Iterable[pb.TokenLogprobs]) -> Any:
    """Log-probabilities of a prompt's tokens. The first has none; its entries are there, and empty."""
    tokens = list(tokens)
    told = vllm.InputLogProbs()
    has_top = any(token.top_logprobs for token in tokens)
    for token in tokens:
        told.token_ids.append(token.token_id)
        told.token_logprobs.add(value=token.logprob if token.HasField("logprob") else None)
        if has_top:
            told.top_logprobs.append(_top(token))
    return told


def _top(token: pb.TokenLogprobs) -> Any:
    """The most likely tokens; of the whole vocabulary, which comes without ids, all of them."""
    ids = token.top_token_ids or range(len(token.top_logprobs))
    return vllm.TopLogProbs(values=token.top_logprobs, token_ids=ids)
