"""Whether an answer can be true: a worker with broken memory must not be able to write a token."""

from __future__ import annotations

import math

import torch

from router.transport.base import CorruptReply


def check_answer(rows_ND: torch.Tensor, out_ND: torch.Tensor, check_finite: bool) -> None:
    """Raises CorruptReply when `out_ND` is no answer to `rows_ND`: another shape or type, or numbers that are none.

    Rows that were not finite when they were sent have no finite answer; that is for others to find.
    """
    if out_ND.shape != rows_ND.shape or out_ND.dtype != rows_ND.dtype:
        raise CorruptReply(
            f"the answer is {out_ND.dtype} {list(out_ND.shape)}, the rows were {rows_ND.dtype} {list(rows_ND.shape)}"
        )
    if check_finite and not is_finite(out_ND) and is_finite(rows_ND):
        num_bad = int((~torch.isfinite(out_ND)).any(1).sum())
        raise CorruptReply(f"{num_bad} of {len(out_ND)} rows hold NaN or infinity")


def is_finite(rows_ND: torch.Tensor) -> bool:
    """Whether all numbers are. NaN and infinity survive a sum, so one pass without a copy is enough; only a sum that
    overflows of itself is looked at again."""
    return math.isfinite(rows_ND.sum().item()) or bool(torch.isfinite(rows_ND).all())
