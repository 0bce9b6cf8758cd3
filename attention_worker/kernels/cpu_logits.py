"""Passes over rows of logits on a CPU: from the head's output to logits, whether they are numbers, the largest.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from grokmoe.native import array, as_f32, as_i32, entry, inner, loop, share, wide

BLOCK = 512
"""Entries whose largest is found before the next ones: the place of the largest is then looked for in one block."""

LOWEST, POSITIVE, INFINITE = np.int32(-(2**31)), np.int32(0x7FFFFFFF), np.int32(0x7F800000)
"""Bits of minus zero, all but the sign, and infinity's."""


@loop(grain=1)
def _scale(element: Any) -> Any:
    @entry
    def run(params: Any) -> None:
        R, V, factor = params[0], params[1], as_f32(np.uint32(params[2]))
        x_RV, out_RV = array(element, params[3], (R, V)), array(np.float32, params[4], (R, V))
        first, end = share(R)
        for row in range(first, end):
            for i in range(V):
                out_RV[row, i] = wide(x_RV[row, i]) * factor

    return run


def scaled(x_RV: torch.Tensor, factor: float) -> torch.Tensor:
    """x * factor, float32."""
    out_RV = torch.empty(x_RV.shape, dtype=torch.float32)
    _scale(x_RV.dtype, len(x_RV), x_RV.shape[1], factor, x_RV.contiguous(), out_RV)
    return out_RV


@loop(grain=4)
def _sum(element: Any) -> Any:
    @entry
    def run(params: Any) -> None:
        R, V = params[0], params[1]
        x_RV, out_R = array(element, params[2], (R, V)), array(np.float32, params[3], (R,))
        first, end = share(R)
        for row in range(first, end):
            total = np.float32(0.0)
            for i in range(V):
                total += wide(x_RV[row, i])
            out_R[row] = total

    return run


def sums(x_RV: torch.Tensor) -> torch.Tensor:
    """The sum of every row, float32."""
    out_R = torch.empty(len(x_RV), dtype=torch.float32)
    _sum(x_RV.dtype, len(x_RV), x_RV.shape[1], x_RV.contiguous(), out_R)
    return out_R


@inner
def _rank(x: Any) -> Any:
    """An int32 that grows with a float32, so that sixteen are compared at once. NaN is above all numbers; both zeros
    are one."""
    bits = as_i32(x)
    bits = np.int32(0) if bits == LOWEST else bits
    is_nan = (bits & POSITIVE) > INFINITE
    return POSITIVE if is_nan else bits ^ ((bits >> np.int32(31)) & POSITIVE)


@loop(grain=1)
def _first_largest(element: Any) -> Any:
    @entry
    def run(params: Any) -> None:
        R, V = params[0], params[1]
        x_RV, ids_R = array(np.float32, params[2], (R, V)), array(np.int64, params[3], (R,))
        values_R = array(np.float32, params[4], (R,))
        first, end = share(R)
        for row in range(first, end):
            best, best_block = LOWEST, 0
            for begin in range(0, V, BLOCK):
                largest = LOWEST
                for i in range(begin, min(begin + BLOCK, V)):
                    largest = max(largest, _rank(x_RV[row, i]))
                if largest > best:
                    best, best_block = largest, begin
            ids_R[row], values_R[row] = best_block, x_RV[row, best_block]
            for i in range(best_block, min(best_block + BLOCK, V)):
                if _rank(x_RV[row, i]) == best:
                    ids_R[row], values_R[row] = i, x_RV[row, i]
                    break

    return run


def first_largest(x_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `attention_worker.largest`."""
    ids_R = torch.empty(len(x_RV), dtype=torch.int64)
    values_R = torch.empty(len(x_RV), dtype=torch.float32)
    _first_largest(torch.float32, len(x_RV), x_RV.shape[1], x_RV.contiguous(), ids_R, values_R)
    return ids_R, values_R
