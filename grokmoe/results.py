"""What generation, scoring and tokenisation return: frozen values, and how they are read from grokmoe.v1."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

from grokmoe.errors import InternalError
from grokmoe.logprobs import TokenLogprob, read_logprobs
from grokmoe.read_fields import read_fields
from grokmoe.v1 import generation_pb2 as pb


class FinishReason(enum.StrEnum):
    """Why generation ended."""

    STOP = "stop"
    """An end-of-sequence id, a stop token id or a stop string, or the structured output was complete."""
    LENGTH = "length"
    """`max_tokens` or the context was reached."""
    ABORTED = "aborted"
    """Somebody named the request in `abort`."""
    UNKNOWN = "unknown"
    """A reason that this version of the client does not know."""


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request cost. `cached_tokens` of the prompt's were found in the prefix cache.

    `completion_tokens` are those of all candidates.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from arrival at the server to: first scheduled, first token (TTFT), end."""

    queue_seconds: float
    first_token_seconds: float
    total_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """One continuation. `token_ids` includes the stop token if there is one; `text` does not.

    logprobs: one per generated id if they were asked for, else empty.
    stopped_by: the stop string or the id that ended it; None if something else did.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    stopped_by: int | str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer: `candidates` in order, at least one; the properties are of the first.

    prompt_logprobs: one per token of the prompt if they were asked for, else empty.
    """

    request_id: str
    candidates: tuple[Candidate, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    usage: Usage
    timing: Timing

    @property
    def text(self) -> str:
        """Of the first candidate."""
        return self.candidates[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the first candidate."""
        return self.candidates[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Of the first candidate."""
        return self.candidates[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        """Of the first candidate."""
        return self.candidates[0].finish_reason

    @property
    def stopped_by(self) -> int | str | None:
        """Of the first candidate."""
        return self.candidates[0].stopped_by


@dataclasses.dataclass(frozen=True, slots=True)
class Delta:
    """What is new of candidate `index` in a stream. Deltas of several candidates come as they are made.

    Only the last of a candidate has `finish_reason`, only the last of the stream `timing`, only the first of
    candidate 0 `prompt_logprobs`. `usage` counts from the stream's start.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    stopped_by: int | str | None
    usage: Usage
    timing: Timing | None


@dataclasses.dataclass(frozen=True, slots=True)
class ScoreResult:
    """How likely the model finds a text: one entry per token, and the sum of all but the first."""

    request_id: str
    logprobs: tuple[TokenLogprob, ...]
    total_logprob: float
    usage: Usage
    timing: Timing

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of all tokens but the first; nan for a single token."""
        num_judged = len(self.logprobs) - 1
        return math.exp(-self.total_logprob / num_judged) if num_judged > 0 else math.nan


@dataclasses.dataclass(frozen=True, slots=True)
class Tokens:
    """A text as token ids, and each one's text as the vocabulary has it."""

    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is served. `context_length` bounds prompt and output together; text prompts need `has_tokenizer`.

    bos_token_id: None if the model has none; it is not added to a prompt unless `add_bos` says so.
    """

    name: str
    config_hash: str
    vocab_size: int
    context_length: int
    num_layers: int
    num_experts: int
    experts_per_token: int
    hidden_size: int
    eos_token_ids: tuple[int, ...]
    has_tokenizer: bool
    dtype: str
    bos_token_id: int | None


_FINISH_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_ABORTED: FinishReason.ABORTED,
}


def _finish_reason(number: int) -> FinishReason | None:
    if number == pb.FINISH_REASON_UNSPECIFIED:
        return None
    return _FINISH_REASONS.get(number, FinishReason.UNKNOWN)


def _stopped_by(message: pb.Candidate | pb.StreamGenerateResponse) -> Any:
    which = message.WhichOneof("stopped_by")
    return None if which is None else getattr(message, which)


def _read_candidate(message: pb.Candidate) -> Candidate:
    finish_reason = _finish_reason(message.finish_reason)
    if finish_reason is None:
        raise InternalError("the server answered without a finish reason")
    return read_fields(
        Candidate,
        message,
        token_ids=tuple(message.token_ids),
        logprobs=read_logprobs(message.logprobs),
        finish_reason=finish_reason,
        stopped_by=_stopped_by(message),
    )


def read_completion(message: pb.GenerateResponse) -> Completion:
    """InternalError if there is no candidate, or one without a reason why it ended."""
    if not message.candidates:
        raise InternalError("the server answered without a candidate")
    return read_fields(
        Completion,
        message,
        candidates=tuple(map(_read_candidate, message.candidates)),
        prompt_logprobs=read_logprobs(message.prompt_logprobs),
        usage=read_fields(Usage, message.usage),
        timing=read_fields(Timing, message.timing),
    )


def read_delta(message: pb.StreamGenerateResponse) -> Delta:
    """One message of a stream."""
    return Delta(
        index=message.index,
        text=message.text_delta,
        token_ids=tuple(message.token_ids),
        logprobs=read_logprobs(message.logprobs),
        prompt_logprobs=read_logprobs(message.prompt_logprobs),
        finish_reason=_finish_reason(message.finish_reason),
        stopped_by=_stopped_by(message),
        usage=read_fields(Usage, message.usage),
        timing=read_fields(Timing, message.timing) if message.HasField("timing") else None,
    )


def read_score(message: pb.ScoreResponse) -> ScoreResult:
    """The judgement of one text."""
    return read_fields(
        ScoreResult,
        message,
        logprobs=read_logprobs(message.logprobs),
        usage=read_fields(Usage, message.usage),
        timing=read_fields(Timing, message.timing),
    )


def read_tokens(message: pb.TokenizeResponse) -> Tokens:
    """The tokens of a text."""
    return Tokens(tuple(message.token_ids), tuple(message.pieces))


def read_model(message: pb.GetModelResponse) -> ModelInfo:
    """What is served."""
    return read_fields(
        ModelInfo,
        message,
        eos_token_ids=tuple(message.eos_token_ids),
        bos_token_id=message.bos_token_id if message.HasField("bos_token_id") else None,
    )
