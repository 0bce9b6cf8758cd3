"""One step of an attention worker as plain values: what the router asks for and what comes back.

Shared by the router, which writes plans, and the attention worker, which validates and runs them. Does not import
torch: a plan is bookkeeping. Long lists of ids are packed (`pack_ids`), so that a plan costs the same however long the
text is.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from array import array
from collections.abc import Iterable
from typing import Any

WHOLE_VOCABULARY = -1
"""As a number of most likely tokens: all of them, in the order of their ids."""


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids as uint32, little-endian."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


@dataclasses.dataclass(frozen=True, slots=True)
class Penalties:
    """What makes tokens less likely that are there already, as vLLM has it.

    repetition: divides positive and multiplies negative logits of tokens in prompt or output; 1: none.
    frequency: taken from a token's logit for each time it is in the output; 0: none.
    presence: taken from the logit of each token that is in the output; 0: none.
    prompt_ids, output_ids: packed.
    """

    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    prompt_ids: bytes = b""
    output_ids: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True)
class TokenSampling:
    """How one token is chosen. With `temperature` 0 the most likely one; otherwise `seed` and position decide.

    The logits pass, in this order: allowed, bias, penalties, temperature, min_p, top_k, top_p.

    bias_ids, bias: added to the logits of these tokens; minus infinity bars a token.
    allowed: a bit per token, that of token i is `allowed[i // 8] & 1 << i % 8`, padded to a multiple of 4 bytes; only
        tokens whose bit is set can be drawn. Empty: all.
    num_logprobs: log-probabilities wanted, of the drawn token and of so many most likely ones; None: none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    bias_ids: tuple[int, ...] = ()
    bias: tuple[float, ...] = ()
    penalties: Penalties | None = None
    allowed: bytes = b""
    num_logprobs: int | None = None


GREEDY = TokenSampling()


@dataclasses.dataclass(frozen=True, slots=True)
class TokenScoring:
    """Log-probabilities wanted of tokens that are given, not drawn.

    first: first of the chunk's tokens whose successor is judged.
    target_ids: that successor, and those of the tokens after it; at most as many as the chunk has tokens from `first`.
    num_top: most likely tokens returned beside each.
    """

    first: int
    target_ids: tuple[int, ...]
    num_top: int = 0


class LogitsScope(enum.IntEnum):
    """Which rows of logits a chunk returns. The numbers are those of the wire (grokmoe/plan_codec.py)."""

    NONE = 0
    ALL = 2


@dataclasses.dataclass(frozen=True, slots=True)
class SequenceChunk:
    """Consecutive tokens of one sequence.

    token_ids: their keys and values go to positions start, start + 1, ...
    page_ids: pages of positions 0 .. start + len(token_ids) - 1.
    sampling: set when the last token's successor is wanted.
    scoring: set when given tokens are to be judged.
    embeds: what the residual of the first tokens begins with, in place of what their ids give: float32 tensor
        [at most all of them, hidden_size]; None: of no token.
    """

    token_ids: tuple[int, ...]
    start: int
    page_ids: tuple[int, ...]
    sampling: TokenSampling | None = None
    logits: LogitsScope = LogitsScope.NONE
    scoring: TokenScoring | None = None
    embeds: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """Chunks of different sequences, prefill and decode mixed, and the incarnation whose pages they name.

    hidden_state: for a worker without the first layer, what those before it have made of the tokens: the residual,
        float32 tensor [tokens, hidden_size]. None: it begins with the tokens.
    traceparents: the step's span in the traces that it is written to, see grokmoe/trace_context.py.
    """

    incarnation: str
    chunks: tuple[SequenceChunk, ...]
    hidden_state: Any = None
    traceparents: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class LogprobTable:
    """Log-probabilities of rows, one per token judged or drawn.

    token_ids, logprobs, ranks: of the tokens; rank 1 is the most likely, ties count as at least as likely.
    num_top: entries per row in the next two.
    top_ids: the most likely tokens, most likely first, packed, row after row.
    top_logprobs: theirs, float32, little-endian.

    For the whole vocabulary, num_top is its size, `top_ids` is empty and the rows, in the order of ids, are in
    `StepResult.logits`; the router puts them into `top_logprobs`.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]
    num_top: int = 0
    top_ids: bytes = b""
    top_logprobs: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gives.

    token_ids: one per chunk with sampling, in order.
    logits: what was asked for over the whole vocabulary: float32 tensor [rows, vocab], or None. In the order of the
        chunks, and of each chunk: its logits, the log-probabilities of its scoring, those of its drawn token.
    logprobs: in the order of the chunks; of each the table of its scoring, then the one of its drawn token.
    faulty_chunks: chunks, by their place in the plan, that came out as something that is not finite. Nothing that was
        computed of them, keys and values included, may be used.
    hidden_state: from a worker without the last layer, and then there are neither tokens nor tables: the plan's
        `hidden_state` for the worker with the next.
    """

    token_ids: tuple[int, ...]
    logits: Any = None
    logprobs: tuple[LogprobTable, ...] = ()
    faulty_chunks: tuple[int, ...] = ()
    hidden_state: Any = None
