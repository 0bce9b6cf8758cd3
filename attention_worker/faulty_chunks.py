"""Which chunks of a step came out as something that is no number, so that nothing of them is used.

One sum per row is enough: a row with a NaN or an infinity in it has no finite sum. Two tensors are looked at. The last
MoE input carries what went wrong in any earlier layer, since the residual goes through all of them, and it has a row
for every token, also for those whose keys and values are all that is wanted. The logits carry the rest.

Letters: T tokens, D hidden, R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attention_worker.logit_rows import LogitRows
from attention_worker.row_passes import row_sums
from grokmoe.step_plan import SequenceChunk


def faulty_rows(x_RV: torch.Tensor) -> list[int]:
    """Rows that hold something that is not finite."""
    sums_R = row_sums(x_RV)
    if sums_R.sum().isfinite():
        return []
    return [int(row) for row in (~sums_R.isfinite()).nonzero()[:, 0]]


def faulty_chunks(
    chunks: Sequence[SequenceChunk], rows: LogitRows, x_TD: torch.Tensor, logits_RV: torch.Tensor
) -> tuple[int, ...]:
    """The chunks concerned, by their place in the plan. x_TD: the last MoE input."""
    tokens, logits = faulty_rows(x_TD), faulty_rows(logits_RV)
    if not tokens and not logits:
        return ()
    found, begin = [], 0
    for index, chunk in enumerate(chunks):
        end = begin + len(chunk.token_ids)
        # A row of logits belongs to the chunk whose token it comes from.
        own = {row for row, token in enumerate(rows.step_rows_R) if begin <= token < end}
        if own.intersection(logits) or any(begin <= token < end for token in tokens):
            found.append(index)
        begin = end
    return tuple(found)
