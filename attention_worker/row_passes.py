"""Single passes over long rows: compiled loops on a CPU, torch elsewhere. What is found in a row depends on it alone.

Letters: R rows, V vocabulary, N rows of a table, T rows taken, D their width.
"""

from __future__ import annotations

import torch


def scaled(x_RV: torch.Tensor, factor: float) -> torch.Tensor:
    """x * factor, float32."""
    if x_RV.device.type == "cpu":
        from attention_worker.kernels import cpu_logits  # numba is not loaded where it is not used

        return cpu_logits.scaled(x_RV, factor)
    return x_RV.float() * factor


def row_sums(x_RV: torch.Tensor) -> torch.Tensor:
    """The sum of every row [R], float32."""
    if x_RV.device.type == "cpu":
        from attention_worker.kernels import cpu_logits

        return cpu_logits.sums(x_RV)
    return x_RV.sum(-1, dtype=torch.float32)


def first_largest(x_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, values) [R] of each row's largest entry, the first of equals. The value of a row that holds NaN is NaN.

    x_RV: float32.
    """
    if x_RV.device.type == "cpu":
        from attention_worker.kernels import cpu_logits

        return cpu_logits.first_largest(x_RV)
    ids_R = x_RV.argmax(-1)
    return ids_R, x_RV.gather(1, ids_R[:, None])[:, 0]


def rows_of(table_ND: torch.Tensor, ids_T: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """factor * table[ids], float32 [T, D]. IndexError (on a CPU) for a number that the table does not have."""
    if table_ND.device.type == "cpu":
        from attention_worker.kernels import cpu_take

        return cpu_take.take(table_ND, ids_T, factor)
    return table_ND.index_select(0, ids_T).float() * factor


def times(x_TD: torch.Tensor, factor: float) -> torch.Tensor:
    """x * factor, of x's type."""
    if x_TD.device.type == "cpu":
        from attention_worker.kernels import cpu_take

        return cpu_take.times(x_TD, factor)
    return x_TD * factor
