"""How likely the model found tokens: what a caller reads, over the arrays of the messages. Natural logarithms."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from grokmoe.v1 import generation_pb2 as pb


class TopLogprobs(Mapping[int, float]):
    """Log-probabilities of the most likely tokens at one position, by token id, most likely first.

    If the whole vocabulary was asked for it has every id, in the order of ids. It reads the message it came in, so
    that a vocabulary costs nothing until a value is asked for.
    """

    __slots__ = ("_logprobs", "_token_ids")

    def __init__(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """token_ids: of each log-probability. Sequences are kept, not copied."""
        self._token_ids = token_ids
        self._logprobs = logprobs

    def __getitem__(self, token_id: int) -> float:
        try:
            return self._logprobs[self._token_ids.index(token_id)]
        except ValueError:
            raise KeyError(token_id) from None

    def __iter__(self) -> Iterator[int]:
        return iter(self._token_ids)

    def __len__(self) -> int:
        return len(self._token_ids)

    def most_likely(self, count: int) -> tuple[tuple[int, float], ...]:
        """The `count` most likely (token id, log-probability), most likely first."""
        pairs = zip(self._token_ids, self._logprobs, strict=True)
        return tuple(heapq.nlargest(count, pairs, key=lambda pair: (pair[1], -pair[0])))

    def __reduce__(self) -> tuple[Any, ...]:
        return TopLogprobs, (self._token_ids, tuple(self._logprobs))  # what protobuf holds cannot be pickled

    def __repr__(self) -> str:
        shown = ", ".join(f"{token_id}: {logprob:.4g}" for token_id, logprob in self.most_likely(3))
        return f"TopLogprobs({{{shown}{', ...' if len(self) > 3 else ''}}}, {len(self)} tokens)"


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model found one token; `logprob` is None for the first token of a prompt.

    They are of the model's own distribution, before bias, penalties and temperature, but over what structured output
    allows. Rank 1 is the most likely token; `top` has the most likely ones, as many as were asked for.
    """

    token_id: int
    logprob: float | None
    rank: int
    top: TopLogprobs


def read_logprobs(messages: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprob, ...]:
    """One per message."""
    return tuple(
        TokenLogprob(
            message.token_id,
            message.logprob if message.HasField("logprob") else None,
            message.rank,
            # Log-probabilities without ids are those of the whole vocabulary.
            TopLogprobs(tuple(message.top_token_ids) or range(len(message.top_logprobs)), message.top_logprobs),
        )
        for message in messages
    )
