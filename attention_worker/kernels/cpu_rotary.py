"""From a block's projections to attention's inputs on a CPU: queries and keys turned, keys and values into the cache.

Shapes: T tokens, H query heads, K KV heads, d head size, X = (H + 2 K) d, P pages, S slots of a page.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from grokmoe.native import array, entry, inner, loop, put, share, wide


@inner
def _turn(x_TX: Any, row: int, column: int, cos_Td: Any, sin_Td: Any, out: Any, out_row: int, out_column: int) -> None:
    """Element i turns with i + d / 2, in float32. sin is negative in its first half."""
    d = cos_Td.shape[1]
    half = d // 2
    for i in range(half):
        left, right = wide(x_TX[row, column + i]), wide(x_TX[row, column + half + i])
        put(out, out_row, out_column + i, left * cos_Td[row, i] + right * sin_Td[row, i])
        put(out, out_row, out_column + half + i, right * cos_Td[row, half + i] + left * sin_Td[row, half + i])


@loop(grain=8)
def _rotate_and_store(element: Any) -> Any:
    @entry
    def run(params: Any) -> None:
        T, H, K, d, num_slots = params[0], params[1], params[2], params[3], params[4]
        qkv_TX = array(element, params[5], (T, (H + 2 * K) * d))
        cos_Td, sin_Td = array(np.float32, params[6], (T, d)), array(np.float32, params[7], (T, d))
        slots_T = array(np.int64, params[8], (T,))
        q_TX = array(element, params[9], (T, H * d))
        k_Xd = array(element, params[10], (K * num_slots, d))
        v_Xd = array(element, params[11], (K * num_slots, d))
        first, end = share(T)
        for row in range(first, end):
            for head in range(H):
                _turn(qkv_TX, row, head * d, cos_Td, sin_Td, q_TX, row, head * d)
            for head in range(K):
                slot = head * num_slots + slots_T[row]
                _turn(qkv_TX, row, (H + head) * d, cos_Td, sin_Td, k_Xd, slot, 0)
                for i in range(d):
                    v_Xd[slot, i] = qkv_TX[row, (H + K + head) * d + i]

    return run


def rotate_and_store(
    qkv_TX: torch.Tensor,
    cos_T1d: torch.Tensor,
    sin_T1d: torch.Tensor,
    k_KPSd: torch.Tensor,
    v_KPSd: torch.Tensor,
    slots_T: torch.Tensor,
) -> torch.Tensor:
    """Turns queries and keys by their positions' angles and stores keys and values in their slots.

    slots_T: int64, page * S + offset; the caller has checked that the cache has them. Returns q_THd.
    """
    num_kv_heads, num_pages, page_size, head_dim = k_KPSd.shape
    num_heads = qkv_TX.shape[1] // head_dim - 2 * num_kv_heads
    q_THd = torch.empty(len(qkv_TX), num_heads, head_dim, dtype=qkv_TX.dtype)
    _rotate_and_store(
        qkv_TX.dtype, len(qkv_TX), num_heads, num_kv_heads, head_dim, num_pages * page_size,
        qkv_TX, cos_T1d, sin_T1d, slots_T, q_THd, k_KPSd, v_KPSd,
    )  # fmt: skip
    return q_THd
