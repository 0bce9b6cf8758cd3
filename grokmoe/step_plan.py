"""One step of an attention worker as plain values: what the router asks for and what comes back.

Shared by the router, which writes plans, and the attention worker, which validates and runs them. Does not import
torch: a plan is bookkeeping.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from grokmoe.errors import InvalidRequest
from grokmoe.v1 import attention_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class TokenSampling:
    """How one token is chosen. With `temperature` 0 the most likely one; otherwise `seed` and position decide."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


GREEDY = TokenSampling()


class LogitsScope(enum.IntEnum):
    """Which rows of logits a chunk returns."""

    NONE = attention_pb2.LOGITS_SCOPE_UNSPECIFIED
    LAST = attention_pb2.LOGITS_SCOPE_LAST
    ALL = attention_pb2.LOGITS_SCOPE_ALL


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


def plan_to_proto(plan: StepPlan) -> attention_pb2.StepPlan:
    """Renders a plan for the wire."""
    proto = attention_pb2.StepPlan(incarnation=plan.incarnation)
    for chunk in plan.chunks:
        sampling = None
        if chunk.sampling is not None:
            sampling = attention_pb2.TokenSampling(
                temperature=chunk.sampling.temperature,
                top_k=chunk.sampling.top_k,
                top_p=chunk.sampling.top_p,
                seed=chunk.sampling.seed,
            )
        proto.chunks.add(
            token_ids=chunk.token_ids,
            start=chunk.start,
            page_ids=chunk.page_ids,
            sampling=sampling,
            logits=chunk.logits.value,
        )
    return proto


def plan_from_proto(proto: attention_pb2.StepPlan) -> StepPlan:
    """Reads a plan from the wire. Whether it can be run is for the attention worker to check."""
    chunks = []
    for chunk in proto.chunks:
        sampling = None
        if chunk.HasField("sampling"):
            wire = chunk.sampling
            sampling = TokenSampling(wire.temperature, wire.top_k, wire.top_p or 1.0, wire.seed)
        try:
            scope = LogitsScope(int(chunk.logits))
        except ValueError:
            raise InvalidRequest("plan.chunks.logits", f"is {chunk.logits}: no such scope") from None
        chunks.append(SequenceChunk(tuple(chunk.token_ids), chunk.start, tuple(chunk.page_ids), sampling, scope))
    return StepPlan(proto.incarnation, tuple(chunks))
