"""From the scheduler's steps to the plans of attention workers, and from what comes back to the sequences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from grokmoe.step_plan import (
    WHOLE_VOCABULARY,
    LogitsScope,
    LogprobTable,
    Penalties,
    SequenceChunk,
    StepPlan,
    StepResult,
    TokenSampling,
    TokenScoring,
    pack_ids,
)
from router.sequence import Sequence
from router.step import Chunk, Step


def write_plan(step: Step, incarnation: str, traceparents: tuple[str, ...] = ()) -> StepPlan:
    """What the worker is asked for."""
    return StepPlan(incarnation, tuple(_write_chunk(chunk) for chunk in step.chunks), traceparents=traceparents)


def _write_chunk(chunk: Chunk) -> SequenceChunk:
    return SequenceChunk(
        chunk.token_ids,
        chunk.start,
        chunk.page_ids,
        _sampling(chunk.sequence) if chunk.wants_token else None,
        LogitsScope.ALL if chunk.sequence.request.logits else LogitsScope.NONE,
        _scoring(chunk),
        None if (embeds := chunk.sequence.request.embeds) is None else embeds.chunk(chunk.start, chunk.end),
    )


def _sampling(sequence: Sequence) -> TokenSampling:
    """Made once for a sequence whose tokens do not depend on those before: most are so, and this runs per token."""
    if sequence.fixed_sampling is None:
        sampling = _make_sampling(sequence)
        is_fixed = (
            sampling.penalties is None
            and sequence.constraint is None
            and sequence.num_outputs >= sequence.request.min_tokens
        )
        if not is_fixed:
            return sampling
        sequence.fixed_sampling = sampling
    return sequence.fixed_sampling


def _make_sampling(sequence: Sequence) -> TokenSampling:
    request, how = sequence.request, sequence.request.sampling
    bias = how.logit_bias
    if sequence.num_outputs < request.min_tokens:
        barred = request.stop_ids
        bias = (*(entry for entry in bias if entry[0] not in barred), *((id_, -math.inf) for id_ in barred))
    penalties = None
    if how.has_penalties:
        num_prompt = len(request.prompt_ids)
        penalties = Penalties(
            how.repetition_penalty,
            how.frequency_penalty,
            how.presence_penalty,
            prompt_ids=pack_ids(request.prompt_ids),
            output_ids=pack_ids(sequence.all_ids[num_prompt:]),
        )
    return TokenSampling(
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        seed=how.seed_of(sequence.index),
        min_p=how.min_p,
        bias_ids=tuple(id_ for id_, _ in bias),
        bias=tuple(value for _, value in bias),
        penalties=penalties,
        allowed=b"" if sequence.constraint is None else sequence.constraint.allowed(),
        num_logprobs=request.logprobs,
    )


def _scoring(chunk: Chunk) -> TokenScoring | None:
    """Every prompt token but the first is judged at the position before it."""
    sequence = chunk.sequence
    if not sequence.scores_prompt:
        return None
    targets = sequence.request.prompt_ids[chunk.start + 1 : chunk.end + 1]
    num_top = sequence.request.prompt_logprobs
    assert num_top is not None
    return TokenScoring(0, targets, num_top) if targets else None


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkResult:
    """What a worker returned for one chunk beside its token. Tables are complete, also over the whole vocabulary."""

    chunk: Chunk
    logits: object | None = None
    prompt_logprobs: LogprobTable | None = None
    logprobs: LogprobTable | None = None


def read_extras(step: Step, plan: StepPlan, result: StepResult) -> Iterator[ChunkResult]:
    """The chunks for which more than a token came back. The order is that of StepResult."""
    tables, row = iter(result.logprobs), 0

    def take_rows(num_rows: int) -> object:
        nonlocal row
        row += num_rows
        return result.logits[row - num_rows : row]

    def take_table(num_top: int) -> LogprobTable:
        table = next(tables)
        if num_top != WHOLE_VOCABULARY:
            return table
        rows: object = take_rows(len(table.token_ids))
        return dataclasses.replace(table, top_logprobs=rows.numpy().tobytes())  # type: ignore[attr-defined]

    for chunk, asked in zip(step.chunks, plan.chunks, strict=True):
        logits = take_rows(len(asked.token_ids)) if asked.logits is LogitsScope.ALL else None
        scored = None if asked.scoring is None else take_table(asked.scoring.num_top)
        sampling = asked.sampling
        drawn = None if sampling is None or sampling.num_logprobs is None else take_table(sampling.num_logprobs)
        if (logits, scored, drawn) != (None, None, None):
            yield ChunkResult(chunk, logits, scored, drawn)
