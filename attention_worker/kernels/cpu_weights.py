"""Softmax weights of capped scores on the CPU, in one pass over what the products left.

    cap * tanh(s / cap) = cap - 2 * cap / (1 + exp(2 * s / cap))

The cap's own constant is not seen by a softmax, and the largest weight is where the largest score is.
Shapes: B pairs of tile and KV head, R rows of a tile, G query heads of a KV head, Q = R * G, L keys.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from grokmoe.native import array, as_f32, clamped, entry, exp2, inner, loop, put, share, wide

LOWEST, HIGHEST = np.float32(-126.0), np.float32(126.0)
"""Exponents that a float32 has."""


def exponents(scale: float, cap: float) -> tuple[float, float]:
    """(factor, depth), such that exp2(-depth / (1 + exp2(factor * q.k))) is a weight up to what all have in common."""
    return 2.0 * scale / cap * math.log2(math.e), 2.0 * cap * math.log2(math.e)


@inner
def exponent(score: float, depth: float) -> Any:
    """The power of two that is a score's weight; from -depth to 0. score: times `factor`."""
    return -depth / (np.float32(1.0) + exp2(clamped(score, LOWEST, HIGHEST)))


@loop(grain=16)
def _weigh(element: Any) -> Any:
    @entry
    def run(params: Any) -> None:
        size, rows, G, L, depth = params[0], params[1], params[2], params[3], as_f32(np.uint32(params[4]))
        high_XL, low_XL = array(element, params[5], (size, L)), array(element, params[6], (size, L))
        num_seen, sums_X = array(np.int64, params[7], (rows,)), array(np.float32, params[8], (size,))
        first, end = share(size)
        for x in range(first, end):
            num = num_seen[x // G]
            largest = np.float32(-np.inf)
            for i in range(num):
                largest = max(largest, wide(high_XL[x, i]) + wide(low_XL[x, i]))
            top = exponent(largest, depth)
            for i in range(num):
                power = exponent(wide(high_XL[x, i]) + wide(low_XL[x, i]), depth) - top
                put(high_XL, x, i, exp2(clamped(power, LOWEST, HIGHEST)))
            for i in range(num, L):
                put(high_XL, x, i, np.float32(0.0))
            # The sum of the rounded weights: where one key has nearly all the weight, its rounding then cancels.
            total = np.float32(0.0)
            for i in range(num):
                total += wide(high_XL[x, i])
            sums_X[x] = total

    return run


def weigh(high_BQL: torch.Tensor, low_BQL: torch.Tensor, num_seen_BR: torch.Tensor, depth: float) -> torch.Tensor:
    """Weights in place of scores, before division by their sums, which are returned: [B, Q, 1] float32.

    A score is high + low. num_seen_BR: int64, the first keys that each row may see; the others' weight is zero.
    """
    B, Q, L = high_BQL.shape
    sums_BQ1 = torch.empty(B, Q, 1, dtype=torch.float32)
    num_rows = num_seen_BR.numel()
    _weigh(
        high_BQL.dtype, B * Q, num_rows, B * Q // num_rows, L, depth, high_BQL, low_BQL, num_seen_BR, sums_BQ1
    )  # fmt: skip
    return sums_BQ1
