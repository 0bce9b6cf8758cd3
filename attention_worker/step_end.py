"""The end of a step: what is not finite is set aside, tokens are drawn from the rest.

Where adapters add tokens, chunks have vocabularies of different sizes. Those of one size are ended together, as if they
were a step of their own: what is beside a row never matters to it, and neither must how long the other rows are.

Letters: C chunks, T tokens of the step, D hidden, R rows of logits, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch.nn import functional

from attention_worker.draws import take
from attention_worker.faulty_chunks import faulty_chunks, faulty_rows
from attention_worker.logit_rows import LogitRows
from attention_worker.step_output import step_result
from grokmoe.step_plan import WHOLE_VOCABULARY, LogitsScope, LogprobTable, SequenceChunk, StepResult


def end_step(
    chunks: Sequence[SequenceChunk],
    rows: LogitRows | None,
    x_TD: torch.Tensor,
    last: torch.Tensor,
    vocab_sizes_C: Sequence[int] | None = None,
) -> StepResult:
    """rows: what the logits are of; None: there is no head here. x_TD: the last MoE input. last: what the forward has
    returned, logits or the residual. vocab_sizes_C: of the chunks, where they are not all the model's.
    """
    if rows is None:
        return StepResult((), hidden_state=last, faulty_chunks=faulty_chunks(chunks, last))
    if vocab_sizes_C is None:
        return _end(chunks, rows, x_TD, last)
    results: dict[int, StepResult] = {}
    for size in set(vocab_sizes_C):
        is_own = [its == size for its in vocab_sizes_C]
        own = list(itertools.compress(chunks, is_own))
        tokens = _of_chunks([len(chunk.token_ids) for chunk in chunks], is_own)
        logits = _of_chunks([len(LogitRows.of([chunk]).step_rows_R) for chunk in chunks], is_own)
        results[size] = _end(own, LogitRows.of(own), take(x_TD, tokens), take(last, logits)[:, :size].contiguous())
    return _put_together(chunks, vocab_sizes_C, results)


def _end(chunks: Sequence[SequenceChunk], rows: LogitRows, x_TD: torch.Tensor, logits_RV: torch.Tensor) -> StepResult:
    faulty = faulty_chunks(chunks, x_TD, rows.step_rows_R, logits_RV)
    if faulty:
        logits_RV = logits_RV.clone()
        logits_RV[faulty_rows(logits_RV)] = 0.0  # nobody looks at them, but what is computed of them must be defined
    return dataclasses.replace(step_result(chunks, rows, logits_RV), faulty_chunks=faulty)


def _of_chunks(counts_C: Sequence[int], is_own: Sequence[bool]) -> list[int]:
    """Places of the rows of some chunks, where each has so many."""
    ends = list(itertools.accumulate(counts_C))
    spans = (range(end - count, end) for end, count in zip(ends, counts_C, strict=True))
    return [row for span in itertools.compress(spans, is_own) for row in span]


def _put_together(
    chunks: Sequence[SequenceChunk], vocab_sizes_C: Sequence[int], results: dict[int, StepResult]
) -> StepResult:
    """One result in the order of the chunks. Rows over the whole vocabulary are as long as the longest."""
    tokens = {size: iter(result.token_ids) for size, result in results.items()}
    tables = {size: iter(result.logprobs) for size, result in results.items()}
    past = dict.fromkeys(results, 0)
    token_ids: list[int] = []
    logprobs: list[LogprobTable] = []
    parts: list[torch.Tensor] = []
    for chunk, size in zip(chunks, vocab_sizes_C, strict=True):
        if chunk.sampling is not None:
            token_ids.append(next(tokens[size]))
        num_tables, num_rows = _num_returned(chunk)
        logprobs.extend(itertools.islice(tables[size], num_tables))
        if num_rows:
            part_RV = results[size].logits[past[size] : past[size] + num_rows]
            parts.append(functional.pad(part_RV, (0, max(vocab_sizes_C) - size), value=float("-inf")))
            past[size] += num_rows
    places = {size: [place for place, its in enumerate(vocab_sizes_C) if its == size] for size in results}
    faulty = sorted(places[size][each] for size, result in results.items() for each in result.faulty_chunks)
    payload = torch.cat(parts) if parts else None
    return StepResult(tuple(token_ids), payload, tuple(logprobs), faulty_chunks=tuple(faulty))


def _num_returned(chunk: SequenceChunk) -> tuple[int, int]:
    """(tables, rows over the whole vocabulary) of a chunk in a result; the order is that of StepResult."""
    num_tables, num_rows = 0, len(chunk.token_ids) if chunk.logits is LogitsScope.ALL else 0
    if chunk.scoring is not None:
        num_tables += 1
        num_rows += len(chunk.scoring.target_ids) * (chunk.scoring.num_top == WHOLE_VOCABULARY)
    if chunk.sampling is not None and chunk.sampling.num_logprobs is not None:
        num_tables += 1
        num_rows += chunk.sampling.num_logprobs == WHOLE_VOCABULARY
    return num_tables, num_rows
