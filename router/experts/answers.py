"""Whether an answer can be true: a worker with broken memory must not be able to write a token."""

from __future__ import annotations

import math

import torch

from grokmoe.errors import InternalError
from router.transport.base import CorruptReply


class NotFinite(CorruptReply):
    """An answer of the right form, in which some numbers are none.

    rows_ND: the answer.
    """

    def __init__(self, rows_ND: torch.Tensor) -> None:
        num_bad = len(rows_ND) - int(_finite_rows(rows_ND).sum())
        super().__init__(f"{num_bad} of {len(rows_ND)} rows hold NaN or infinity")
        self.rows_ND = rows_ND


class RowsWithoutAnswer(InternalError):
    """Two holders agree that some rows have no finite answer.

    rows_ND: NaN for these, the answers to all others.
    """

    def __init__(self, rows_ND: torch.Tensor) -> None:
        super().__init__(f"2 expert workers agree on an answer that cannot be: {NotFinite(rows_ND).message}")
        self.rows_ND = rows_ND


def check_answer(rows_ND: torch.Tensor, out_ND: torch.Tensor, check_finite: bool) -> None:
    """Raises CorruptReply when `out_ND` is no answer to `rows_ND`: another shape or type, or numbers that are none.

    Rows that were not finite when they were sent have no finite answer; that is for others to find.
    """
    if out_ND.shape != rows_ND.shape or out_ND.dtype != rows_ND.dtype:
        raise CorruptReply(
            f"the answer is {out_ND.dtype} {list(out_ND.shape)}, the rows were {rows_ND.dtype} {list(rows_ND.shape)}"
        )
    if check_finite and not is_finite(out_ND) and is_finite(rows_ND):
        raise NotFinite(out_ND)


def merge(first_ND: torch.Tensor, second_ND: torch.Tensor) -> torch.Tensor:
    """Two answers to the same rows as one: each row from whichever has it finite, the second if both have; NaN where
    neither has, for the two agree that there is none."""
    is_first_good_N1, is_second_good_N1 = _finite_rows(first_ND)[:, None], _finite_rows(second_ND)[:, None]
    out_ND = torch.where(is_second_good_N1, second_ND, first_ND)
    return out_ND.masked_fill(~(is_first_good_N1 | is_second_good_N1), torch.nan)


def _finite_rows(rows_ND: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(rows_ND).all(1)


def is_finite(rows_ND: torch.Tensor) -> bool:
    """Whether all numbers are. NaN and infinity survive a sum, so one pass without a copy is enough; only a sum that
    overflows of itself is looked at again."""
    return math.isfinite(rows_ND.sum().item()) or bool(torch.isfinite(rows_ND).all())
