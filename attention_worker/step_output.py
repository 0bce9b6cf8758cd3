"""From a step's logits to its result: tokens are drawn, what was asked for of the logits is computed and put in order.

Letters: R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attention_worker.draws import take
from attention_worker.logit_rows import LogitRows
from attention_worker.logprobs import score, score_drawn
from attention_worker.sampler import sample
from grokmoe.step_plan import LogprobTable, SequenceChunk, StepResult

Scored = tuple[LogprobTable, torch.Tensor | None]


def step_result(chunks: Sequence[SequenceChunk], rows: LogitRows, logits_RV: torch.Tensor) -> StepResult:
    """The result of a step. logits_RV: of `rows`; may become part of the result, is never written to."""
    drawing = [index for index, chunk in enumerate(chunks) if chunk.sampling is not None]
    last_rows = [last for chunk_rows in rows.chunks if (last := chunk_rows.last) is not None]
    sampling = [chunk.sampling for chunk in chunks if chunk.sampling is not None]
    positions = [chunks[index].start + len(chunks[index].token_ids) for index in drawing]
    tokens = sample(take(logits_RV, last_rows), sampling, positions)
    wanted = [number for number, how in enumerate(sampling) if how.num_logprobs is not None]
    drawn: dict[int, Scored] = {}
    if wanted:
        tables = score_drawn(
            take(logits_RV, [last_rows[number] for number in wanted]),
            [tokens[number] for number in wanted],
            [sampling[number] for number in wanted],
        )
        drawn = {drawing[number]: table for number, table in zip(wanted, tables, strict=True)}
    parts: list[torch.Tensor] = []
    logprobs: list[LogprobTable] = []
    for index, (chunk, own) in enumerate(zip(chunks, rows.chunks, strict=True)):
        if own.returned:
            parts.append(logits_RV[own.returned.start : own.returned.stop])
        scored: list[Scored] = []
        if chunk.scoring is not None:
            part_RV = logits_RV[own.scored.start : own.scored.stop]
            scored.append(score(part_RV, chunk.scoring.target_ids, chunk.scoring.num_top))
        if index in drawn:
            scored.append(drawn[index])
        for table, whole_RV in scored:
            logprobs.append(table)
            if whole_RV is not None:
                parts.append(whole_RV)
    payload = None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)
    return StepResult(tuple(tokens), None if payload is None else payload.cpu(), tuple(logprobs))
