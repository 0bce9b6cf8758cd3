"""What a client gets of its request: text, log-probabilities, usage and times, message by message."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable

from grokmoe.errors import InvalidRequest
from grokmoe.tokenizer import Tokenizer
from grokmoe.v1 import generation_pb2 as pb
from router.generation import Delivery, Generation
from router.logprobs import prompt_to_messages, to_messages
from router.sequence import FinishReason
from router.text import TextPiece, TextSettings, TextStream
from router.token_message import TokenMessages

_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: pb.FINISH_REASON_ABORTED,
}


@dataclasses.dataclass(slots=True)
class Part:
    """A StreamGenerateResponse as bytes, and what the service has to know of it. timing: of the last one."""

    data: bytes
    index: int
    num_tokens: int
    finish_reason: pb.FinishReason = pb.FINISH_REASON_UNSPECIFIED
    timing: pb.Timing | None = None


@dataclasses.dataclass(slots=True)
class _Candidate:
    """Where one candidate's answer stands."""

    text: TextStream | None
    messages: TokenMessages
    has_begun: bool = False
    is_over: bool = False


class Answer:
    """Turns deliveries into messages. A stop string is found here, later than the engine has gone on drawing: what
    was drawn after it is void.

    has_stop_strings: whether there are any to be found.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer | None, text: TextSettings | None) -> None:
        self._generation = generation
        request = generation.request
        self._candidates = [
            _Candidate(
                TextStream(tokenizer, text) if tokenizer and text else None,
                TokenMessages(request.request_id, sequence.index, len(request.prompt_ids)),
            )
            for sequence in generation.sequences
        ]
        self.has_stop_strings = text is not None and bool(text.stop_strings)
        self._num_live = len(self._candidates)
        self._num_tokens = 0  # of all candidates
        resumed_ids = request.resumed_ids
        if resumed_ids:
            (candidate,) = self._candidates
            self._num_tokens = len(resumed_ids)
            # The caller has their text, as far as it could be sent.
            if candidate.text is not None and candidate.text.push(resumed_ids).stop_string is not None:
                raise InvalidRequest("resumed", "is complete already: it holds a stop string")

    @property
    def is_over(self) -> bool:
        """Whether every candidate has ended."""
        return self._num_live == 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer so far, all candidates."""
        return self._num_tokens

    def add(self, delivery: Delivery) -> pb.StreamGenerateResponse | None:
        """The message for a delivery; None if its candidate is over already."""
        candidate = self._candidates[delivery.index]
        return None if candidate.is_over else self._message(delivery, candidate, self._piece(delivery, candidate))

    def encode(self, delivery: Delivery) -> Part | None:
        """The same, serialised; at a fraction of the cost where there is nothing but text and ids."""
        candidate = self._candidates[delivery.index]
        if candidate.is_over:
            return None
        piece = self._piece(delivery, candidate)
        if self._is_plain(delivery, candidate, piece):
            return self._plain(delivery, candidate, piece)
        message = self._message(delivery, candidate, piece)
        return Part(
            message.SerializeToString(),
            delivery.index,
            len(message.token_ids),
            message.finish_reason,
            message.timing if message.HasField("timing") else None,
        )

    def _piece(self, delivery: Delivery, candidate: _Candidate) -> TextPiece:
        """The text of a delivery, and how many of its tokens count."""
        token_ids = delivery.token_ids
        if candidate.text is None:
            return TextPiece("", len(token_ids), None)
        ended = delivery.finish_reason is not None
        return candidate.text.push(token_ids, ended, ended and self._stop_id(delivery) is not None)

    def _stop_id(self, delivery: Delivery) -> int | None:
        """The token that has stopped the candidate; None if none did, as at the end of a structured output."""
        if delivery.finish_reason is not FinishReason.STOP or not delivery.token_ids:
            return None
        last = delivery.token_ids[-1]
        return last if last in self._generation.request.stop_ids else None

    def _is_plain(self, delivery: Delivery, candidate: _Candidate, piece: TextPiece) -> bool:
        has_more = delivery.logprobs or delivery.finish_reason is not None or piece.stop_string is not None
        return not has_more and (candidate.has_begun or self._generation.request.prompt_logprobs is None)

    def _plain(self, delivery: Delivery, candidate: _Candidate, piece: TextPiece) -> Part:
        num_tokens = piece.num_tokens
        self._num_tokens += num_tokens
        candidate.has_begun = True
        cached = self._generation.sequences[0].num_cached_tokens
        data = candidate.messages.encode(piece.text, delivery.token_ids[:num_tokens], cached, self._num_tokens)
        return Part(data, delivery.index, num_tokens)

    def _message(self, delivery: Delivery, candidate: _Candidate, piece: TextPiece) -> pb.StreamGenerateResponse:
        part = pb.StreamGenerateResponse(request_id=self._generation.request.request_id, index=delivery.index)
        reason, stop_id, num_tokens = delivery.finish_reason, self._stop_id(delivery), piece.num_tokens
        if piece.text:
            part.text_delta = piece.text
        if piece.stop_string is not None:
            reason, stop_id, part.stop_string = FinishReason.STOP, None, piece.stop_string
        part.token_ids.extend(delivery.token_ids[:num_tokens])
        for table in delivery.logprobs[:num_tokens]:
            part.logprobs.extend(to_messages(table))
        self._num_tokens += num_tokens
        if stop_id is not None:
            part.stop_token_id = stop_id
        if reason is FinishReason.ERROR:
            error = self._generation.sequences[delivery.index].error
            assert error is not None
            raise error
        if delivery.index == 0 and not candidate.has_begun:
            self._add_prompt_logprobs(part)
        candidate.has_begun = True
        if reason is not None:
            part.finish_reason = _FINISH[reason]
            candidate.is_over = True
            self._num_live -= 1
        self._account(part)
        return part

    def _add_prompt_logprobs(self, part: pb.StreamGenerateResponse) -> None:
        request, tables = self._generation.request, self._generation.prompt_logprobs()
        # Incomplete if the request was aborted in the middle of its prompt.
        is_complete = 1 + sum(len(table.token_ids) for table in tables) == len(request.prompt_ids)
        if request.prompt_logprobs is not None and is_complete:
            part.prompt_logprobs.extend(prompt_to_messages(request.prompt_ids[0], tables))

    def _account(self, part: pb.StreamGenerateResponse) -> None:
        generation = self._generation
        request, sequence = generation.request, generation.sequences[0]
        part.usage.prompt_tokens = len(request.prompt_ids)
        part.usage.cached_tokens = sequence.num_cached_tokens
        part.usage.completion_tokens = self._num_tokens
        if self.is_over:
            generation.note_ended()
            part.timing.CopyFrom(timing(generation))


def timing(generation: Generation) -> pb.Timing:
    """Where the request's time went, until it ended or until now."""
    ended = generation.ended_at or time.monotonic()
    return pb.Timing(
        queue_seconds=(generation.scheduled_at or ended) - generation.arrived,
        first_token_seconds=(generation.first_token_at or ended) - generation.arrived,
        total_seconds=ended - generation.arrived,
    )


def trailing_metadata(request_id: str, times: pb.Timing) -> tuple[tuple[str, str], ...]:
    """The same for whoever reads no messages: proxies and logs."""
    return (
        ("x-request-id", request_id),
        ("x-queue-seconds", f"{times.queue_seconds:.6f}"),
        ("x-prefill-seconds", f"{max(0.0, times.first_token_seconds - times.queue_seconds):.6f}"),
        ("x-decode-seconds", f"{max(0.0, times.total_seconds - times.first_token_seconds):.6f}"),
    )


def collect(parts: Iterable[pb.StreamGenerateResponse], num_candidates: int) -> pb.GenerateResponse:
    """All messages of a stream as one answer."""
    answer = pb.GenerateResponse(candidates=[pb.Candidate(index=index) for index in range(num_candidates)])
    texts: list[list[str]] = [[] for _ in range(num_candidates)]
    for part in parts:
        candidate = answer.candidates[part.index]
        texts[part.index].append(part.text_delta)
        candidate.token_ids.extend(part.token_ids)
        candidate.logprobs.extend(part.logprobs)
        answer.prompt_logprobs.extend(part.prompt_logprobs)
        if part.finish_reason:
            candidate.finish_reason = part.finish_reason
        stopped_by = part.WhichOneof("stopped_by")
        if stopped_by:
            setattr(candidate, stopped_by, getattr(part, stopped_by))
        answer.request_id = part.request_id
        answer.usage.CopyFrom(part.usage)
        answer.timing.CopyFrom(part.timing)
    for candidate, text in zip(answer.candidates, texts, strict=True):
        candidate.text = "".join(text)
    return answer
