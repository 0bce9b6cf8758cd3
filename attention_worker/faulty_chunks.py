"""Which chunks of a step came out as something that is no number, so that nothing of them is used.

One sum per row is enough: a row with a NaN or an infinity in it has no finite sum. Two tensors are looked at. The last
MoE input carries what went wrong in any earlier layer, since the residual goes through all of them, and it has a row
for every token, also for those whose keys and values are all that is wanted. The logits carry the rest. A stage without
the last layer looks at the residual that it hands on, which carries it all.

Letters: T tokens, D hidden, R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attention_worker.row_passes import row_sums
from grokmoe.step_plan import SequenceChunk


def faulty_rows(x_RV: torch.Tensor) -> list[int]:
    """Rows that hold something that is not finite."""
    sums_R = row_sums(x_RV)
    if sums_R.sum().isfinite():
        return []
    return [int(row) for row in (~sums_R.isfinite()).nonzero()[:, 0]]


def faulty_chunks(
    chunks: Sequence[SequenceChunk],
    x_TD: torch.Tensor,
    token_R: Sequence[int] = (),
    logits_RV: torch.Tensor | None = None,
) -> tuple[int, ...]:
    """The chunks concerned, by their place in the plan.

    x_TD: the last MoE input, or the residual that the step ends with. token_R: the token of each row of logits.
    """
    tokens = set(faulty_rows(x_TD))
    if logits_RV is not None:
        tokens.update(token_R[row] for row in faulty_rows(logits_RV))
    if not tokens:
        return ()
    owners = [place for place, chunk in enumerate(chunks) for _ in chunk.token_ids]
    return tuple(sorted({owners[token] for token in tokens}))
