"""Single passes over long rows: compiled loops on a CPU, torch elsewhere. What is found in a row depends on it alone.

Letters: R rows, V vocabulary.
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
