"""Root-mean-square norms on a CPU, in float32: into a block, and out of it onto the residual.

A row's bits depend on the row alone.
Shapes: T tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from grokmoe.native import array, as_f32, entry, inner, loop, put, share, wide


@inner
def _factor(x_TD: Any, row: int, eps: float) -> Any:
    total = np.float32(0.0)
    for i in range(x_TD.shape[1]):
        x = wide(x_TD[row, i])
        total += x * x
    return np.float32(1.0) / np.sqrt(total / np.float32(x_TD.shape[1]) + eps)


@loop(grain=8)
def _norm(element: Any) -> Any:
    @entry
    def run(params: Any) -> None:
        T, D, eps = params[0], params[1], as_f32(np.uint32(params[2]))
        h_TD, gain_D = array(np.float32, params[3], (T, D)), array(np.float32, params[4], (D,))
        out_TD = array(element, params[5], (T, D))
        first, end = share(T)
        for row in range(first, end):
            factor = _factor(h_TD, row, eps)
            for i in range(D):
                put(out_TD, row, i, h_TD[row, i] * factor * gain_D[i])

    return run


@loop(grain=8)
def _add_normed(element: Any) -> Any:
    @entry
    def run(params: Any) -> None:
        T, D, eps = params[0], params[1], as_f32(np.uint32(params[2]))
        h_TD, gain_D = array(np.float32, params[3], (T, D)), array(np.float32, params[4], (D,))
        y_TD = array(element, params[5], (T, D))
        first, end = share(T)
        for row in range(first, end):
            factor = _factor(y_TD, row, eps)
            for i in range(D):
                h_TD[row, i] += wide(y_TD[row, i]) * factor * gain_D[i]

    return run


def norm(h_TD: torch.Tensor, gain_D: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """gain * h / sqrt(mean(h^2) + eps) over the last dimension; h and gain are float32, the result is of `dtype`."""
    out_TD = torch.empty(h_TD.shape, dtype=dtype)
    _norm(dtype, len(h_TD), h_TD.shape[1], eps, h_TD, gain_D, out_TD)
    return out_TD


def add_normed(h_TD: torch.Tensor, y_TD: torch.Tensor, gain_D: torch.Tensor, eps: float) -> None:
    """Adds the norm of y to h, in place. h and gain are float32."""
    _add_normed(y_TD.dtype, len(h_TD), h_TD.shape[1], eps, h_TD, gain_D, y_TD.contiguous())
