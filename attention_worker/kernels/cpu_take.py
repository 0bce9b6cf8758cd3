"""Rows of a table by their numbers, and rows times a number, on a CPU: compiled loops, so that they can be recorded.

Shapes: N rows of a table, T rows taken, D their width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from grokmoe.native import array, as_f32, entry, loop, put, share, wide


@loop(grain=8)
def _take(element: Any) -> Any:
    @entry
    def run(params: Any) -> None:
        T, N, D, factor = params[0], params[1], params[2], as_f32(np.uint32(params[3]))
        table_ND, ids_T = array(element, params[4], (N, D)), array(np.int64, params[5], (T,))
        out_TD = array(np.float32, params[6], (T, D))
        first, end = share(T)
        for row in range(first, end):
            for i in range(D):
                out_TD[row, i] = wide(table_ND[ids_T[row], i]) * factor

    return run


@loop(grain=8)
def _times(element: Any) -> Any:
    @entry
    def run(params: Any) -> None:
        T, D, factor = params[0], params[1], as_f32(np.uint32(params[2]))
        x_TD, out_TD = array(element, params[3], (T, D)), array(element, params[4], (T, D))
        first, end = share(T)
        for row in range(first, end):
            for i in range(D):
                put(out_TD, row, i, wide(x_TD[row, i]) * factor)

    return run


def take(table_ND: torch.Tensor, ids_T: torch.Tensor, factor: float) -> torch.Tensor:
    """factor * table[ids], float32 [T, D]. IndexError for a number that the table does not have."""
    num_rows, width = table_ND.shape
    if len(ids_T) and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < num_rows:
        raise IndexError(f"rows {int(ids_T.min())} to {int(ids_T.max())} of a table of {num_rows}")
    out_TD = torch.empty(len(ids_T), width, dtype=torch.float32)
    _take(table_ND.dtype, len(ids_T), num_rows, width, factor, table_ND, ids_T, out_TD)
    return out_TD


def times(x_TD: torch.Tensor, factor: float) -> torch.Tensor:
    """x * factor, of x's type."""
    out_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    _times(x_TD.dtype, len(x_TD), x_TD.shape[1], factor, x_TD.contiguous(), out_TD)
    return out_TD
