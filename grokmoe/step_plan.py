"""One step of an attention worker as plain values: what the router asks for and what comes back.

Shared by the router, which writes plans, and the attention worker, which validates and runs them. Does not import
torch: a plan is bookkeeping.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class TokenSampling:
    """How one token is chosen. With `temperature` 0 the most likely one; otherwise `seed` and position decide."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


GREEDY = TokenSampling()


class LogitsScope(enum.IntEnum):
    """Which rows of logits a chunk returns. The numbers are those of the wire (grokmoe/plan_codec.py)."""

    NONE = 0
    LAST = 1
    ALL = 2


@dataclasses.dataclass(frozen=True, slots=True)
class SequenceChunk:
    """Consecutive tokens of one sequence.

    token_ids: their keys and values go to positions start, start + 1, ...
    page_ids: pages of positions 0 .. start + len(token_ids) - 1.
    sampling: set when the last token's successor is wanted.
    """

    token_ids: tuple[int, ...]
    start: int
    page_ids: tuple[int, ...]
    sampling: TokenSampling | None = None
    logits: LogitsScope = LogitsScope.NONE


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """Chunks of different sequences, prefill and decode mixed, and the incarnation whose pages they name."""

    incarnation: str
    chunks: tuple[SequenceChunk, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """token_ids: one per chunk with sampling, in order. logits: [rows asked for, vocab] float32 tensor, or None."""

    token_ids: tuple[int, ...]
    logits: Any = None
