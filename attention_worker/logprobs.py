"""Log-probabilities of tokens, as vLLM has them: of the logits after `allowed`, before bias, penalties and temperature.

Letters: R rows, V vocabulary, N most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from attention_worker.largest import largest, without_nan
from attention_worker.logit_rules import apply_allowed
from attention_worker.row_passes import first_largest
from grokmoe.step_plan import WHOLE_VOCABULARY, LogprobTable, TokenSampling

SLICE_BYTES = 32 * 2**20
"""Log-probabilities of so many rows are in memory at a time, beside what is returned."""


def score(logits_RV: torch.Tensor, token_ids: Sequence[int], num_top: int) -> tuple[LogprobTable, torch.Tensor | None]:
    """(the table of the tokens, one per row; the log-probabilities [R, V] if the whole vocabulary is asked for).

    logits_RV: float32, left as they are.
    A NaN counts as a token that cannot be drawn; where nothing can be, all logarithms are minus infinity.
    """
    num_rows, vocab_size = logits_RV.shape
    is_whole = num_top == WHOLE_VOCABULARY
    whole_RV = torch.empty_like(logits_RV) if is_whole else None
    width = 0 if is_whole else num_top
    logprobs: list[float] = []
    ranks: list[int] = []
    top_ids: list[bytes] = []
    top_logprobs: list[bytes] = []
    step = max(1, SLICE_BYTES // (4 * vocab_size))
    for begin in range(0, num_rows, step):
        part = slice(begin, begin + step)
        logprobs_RV = _log_softmax(logits_RV[part], None if whole_RV is None else whole_RV[part])
        ids_R = torch.tensor(token_ids[part], device=logits_RV.device)
        own_R = logprobs_RV.gather(1, ids_R[:, None])
        logprobs += own_R[:, 0].tolist()
        # numpy counts the bytes of a mask many times faster than torch.
        ranks += map(np.count_nonzero, (logprobs_RV >= own_R).cpu().numpy())
        if width:
            values_RN, ids_RN = largest(logprobs_RV, width)
            top_ids.append(ids_RN.cpu().numpy().astype("<u4").tobytes())
            top_logprobs.append(values_RN.cpu().numpy().astype("<f4").tobytes())
    table = LogprobTable(
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        ranks=tuple(ranks),
        num_top=vocab_size if is_whole else num_top,
        top_ids=b"".join(top_ids),
        top_logprobs=b"".join(top_logprobs),
    )
    return table, whole_RV


def score_drawn(
    logits_RV: torch.Tensor, token_ids: Sequence[int], sampling: Sequence[TokenSampling]
) -> list[tuple[LogprobTable, torch.Tensor | None]]:
    """`score` of one drawn token per row, each with its own `num_logprobs`.

    logits_RV: float32, left as they are. sampling: how the tokens were drawn; all want log-probabilities.
    """
    if any(how.allowed for how in sampling):
        logits_RV = logits_RV.clone()
        apply_allowed(logits_RV, sampling)
    found: dict[int, tuple[LogprobTable, torch.Tensor | None]] = {}
    by_num: dict[int, list[int]] = {}
    for row, how in enumerate(sampling):
        assert how.num_logprobs is not None
        by_num.setdefault(how.num_logprobs, []).append(row)
    for num_top, rows in by_num.items():
        part_RV = logits_RV if len(rows) == len(sampling) else logits_RV[torch.tensor(rows, device=logits_RV.device)]
        table, whole_RV = score(part_RV, [token_ids[row] for row in rows], num_top)
        for index, row in enumerate(rows):
            found[row] = _row_of(table, index), None if whole_RV is None else whole_RV[index : index + 1]
    return [found[row] for row in range(len(sampling))]


def _row_of(table: LogprobTable, row: int) -> LogprobTable:
    top = slice(4 * row * table.num_top, 4 * (row + 1) * table.num_top)
    return LogprobTable(
        table.token_ids[row : row + 1],
        table.logprobs[row : row + 1],
        table.ranks[row : row + 1],
        table.num_top,
        table.top_ids[top],
        table.top_logprobs[top],
    )


def _log_softmax(logits_RV: torch.Tensor, out_RV: torch.Tensor | None) -> torch.Tensor:
    """float32, into `out_RV` if there is one."""
    if not first_largest(logits_RV)[1].isfinite().all():
        logits_RV = without_nan(logits_RV)
    # Without an argument for the type: it would be one more pass.
    logprobs_RV: torch.Tensor = torch.log_softmax(logits_RV, -1, out=out_RV)
    is_empty_R = first_largest(logprobs_RV)[1].isnan()
    if is_empty_R.any():
        logprobs_RV[is_empty_R] = float("-inf")
    return logprobs_RV
