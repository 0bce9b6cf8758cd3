"""What a client asked for, validated: prompt, sampling, where it stops, what form the output must have."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

_SEED_STEP = 0x9E3779B97F4A7C15
_SEED_MASK = (1 << 64) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are drawn; the defaults change nothing. Temperature 0 is greedy. Meanings: generation.proto."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens that are there already matter."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)

    def seed_of(self, index: int) -> int:
        """The seed of one candidate; the first has the request's."""
        return (self.seed + index * _SEED_STEP) & _SEED_MASK


class Constraint(Protocol):
    """What a structured output allows next; router/structured."""

    def allowed(self) -> bytes:
        """The mask of the next token, as TokenSampling.allowed. Raises InvalidRequest when there can be none."""

    def accept(self, token_id: int) -> bool:
        """Takes the token drawn. False: it was not allowed. Raises InvalidRequest when the grammar costs too much."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""


class Grammar(Protocol):
    """A compiled structured output."""

    def start(self) -> Constraint:
        """The state before the first token."""


@dataclasses.dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """A prompt that has no token ids.

    rows_TD: what the residual begins with, tensor [tokens, hidden_size] of float32 or bfloat16.
    digest: names these rows, HASH_BYTES of router/pages.py.
    """

    rows_TD: Any
    digest: bytes

    def chunk(self, start: int, end: int) -> Any:
        """The rows of positions [start, end) that are the prompt's, float32; None: there are none."""
        rows = self.rows_TD[start:end]
        return rows.float() if len(rows) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a client asked for, validated.

    n: candidates.
    max_tokens: 0 computes the prompt and draws nothing.
    stop_ids: ids that end generation when drawn, but not before `min_tokens`.
    logprobs, prompt_logprobs: log-probabilities of so many most likely tokens wanted, of those drawn and of the
        prompt's; None: none, -1: of the whole vocabulary.
    grammar: what form the output must have.
    resumed_ids: output that the caller has already, from before its stream broke; it counts as output in every way.
    logits: the logits of every position are wanted.
    embeds: what stands in place of the prompt's ids, which are then zeros, one for each row; None: ids are ids.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingSettings = SamplingSettings()
    n: int = 1
    max_tokens: int = 128
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    resumed_ids: tuple[int, ...] = ()
    logits: bool = False
    embeds: PromptEmbeds | None = None
