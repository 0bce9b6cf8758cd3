"""Paged attention on the CPU, row by row: every page of a row's sequence is read once, for all heads that share it.

For decoding, where a product with one row's keys is no matrix product; and wherever a row's bits must depend on its
query and its keys alone, which holds here by construction: nothing is batched, padded or cut.

The softmax runs along the pages with the largest score so far, in float32; see `cpu_weights`.

Shapes: T tokens of the step, R rows computed, H query heads, K KV heads, G = H / K query heads of a KV head, P pages,
S slots of a page, B keys of a block, d head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from attention_worker.kernels.cpu_weights import HIGHEST, LOWEST, exponent, exponents
from attention_worker.step_batch import RowsApart
from grokmoe.native import array, as_f32, clamped, entry, exp2, inner, loop, put, share, wide

NONE_YET = np.float32(-3.0e38)
"""The largest exponent before any was seen."""

BLOCK = 32
"""Keys between two looks at the largest score. Fixed, so that the size of pages does not change a row's bits."""

GRAIN_KEYS = 512
"""Keys of one head that a thread does in about ten microseconds."""

AT_ONCE = 4
"""Values that are added up together: the sums then are loaded and stored a fourth as often. Divides BLOCK."""


@inner
def _scores(q_Gd: Any, k_Bd: Any, num: int, factor: float, scores_GB: Any) -> None:
    """factor * q.k of every head with the first `num` keys."""
    G, d = q_Gd.shape
    for s in range(num):
        for g in range(G):
            total = np.float32(0.0)
            for i in range(d):
                total += q_Gd[g, i] * k_Bd[s, i]
            scores_GB[g, s] = total * factor


@inner
def _weights(scores_B: Any, num: int, depth: float, largest: float) -> Any:
    """Weights in place of scores, zero from `num` on, relative to the largest so far. Returns (that one, their sum)."""
    for s in range(num):
        scores_B[s] = exponent(scores_B[s], depth)
    for s in range(num):
        largest = max(largest, scores_B[s])
    total = np.float32(0.0)
    for s in range(num):
        weight = exp2(clamped(scores_B[s] - largest, LOWEST, HIGHEST))
        scores_B[s] = weight
        total += weight
    for s in range(num, len(scores_B)):
        scores_B[s] = np.float32(0.0)
    return largest, total


@inner
def _add_values(weights_GB: Any, v_Bd: Any, num: int, out_Gd: Any) -> None:
    """Adds the weighted values. Slots from `num` up to a multiple of AT_ONCE hold zeros."""
    G, d = out_Gd.shape
    for g in range(G):
        for s in range(0, num, AT_ONCE):
            a, b, c, e = weights_GB[g, s], weights_GB[g, s + 1], weights_GB[g, s + 2], weights_GB[g, s + 3]
            for i in range(d):
                out_Gd[g, i] += (a * v_Bd[s, i] + b * v_Bd[s + 1, i]) + (c * v_Bd[s + 2, i] + e * v_Bd[s + 3, i])


@inner
def _read(cache_XSd: Any, first_page: int, pages: Any, offset: int, first_key: int, num: int, out_Bd: Any) -> None:
    """Keys or values of one head as float32, with zeros up to a multiple of AT_ONCE."""
    page_size, d = cache_XSd.shape[1], cache_XSd.shape[2]
    for s in range(num):
        key = first_key + s
        page = first_page + pages[offset + key // page_size]
        for i in range(d):
            out_Bd[s, i] = wide(cache_XSd[page, key % page_size, i])
    for s in range(num, (num + AT_ONCE - 1) // AT_ONCE * AT_ONCE):
        for i in range(d):
            out_Bd[s, i] = np.float32(0.0)


@loop(grain=1)
def _attend(element: Any) -> Any:
    @entry
    def run(params: Any) -> None:
        size, T, H, K, d, P, S = params[0], params[1], params[2], params[3], params[4], params[5], params[6]
        factor, depth = as_f32(np.uint32(params[7])), as_f32(np.uint32(params[8]))
        q_TX, out_TX = array(element, params[9], (T, H * d)), array(element, params[10], (T, H * d))
        k_XSd, v_XSd = array(element, params[11], (K * P, S, d)), array(element, params[12], (K * P, S, d))
        rows_R, offsets_T = array(np.int64, params[13], (size // K,)), array(np.int64, params[14], (T,))
        num_keys_T, pages = array(np.int64, params[15], (T,)), array(np.int64, params[16], (params[17],))
        G = H // K
        q_Gd, sum_Gd = np.empty((G, d), np.float32), np.empty((G, d), np.float32)
        wide_Bd, scores_GB = np.empty((BLOCK, d), np.float32), np.empty((G, BLOCK), np.float32)
        largest_G, total_G = np.empty(G, np.float32), np.empty(G, np.float32)
        first, end = share(size)
        for unit in range(first, end):
            row, head = rows_R[unit // K], unit % K
            for g in range(G):
                largest_G[g], total_G[g] = NONE_YET, np.float32(0.0)
                for i in range(d):
                    q_Gd[g, i] = wide(q_TX[row, (head * G + g) * d + i])
                    sum_Gd[g, i] = np.float32(0.0)
            for first_key in range(0, num_keys_T[row], BLOCK):
                num = min(BLOCK, num_keys_T[row] - first_key)
                _read(k_XSd, head * P, pages, offsets_T[row], first_key, num, wide_Bd)
                _scores(q_Gd, wide_Bd, num, factor, scores_GB)
                for g in range(G):
                    before = largest_G[g]
                    largest_G[g], total = _weights(scores_GB[g], num, depth, before)
                    if largest_G[g] > before:
                        fading = exp2(clamped(before - largest_G[g], LOWEST, HIGHEST))
                        total_G[g] *= fading
                        for i in range(d):
                            sum_Gd[g, i] *= fading
                    total_G[g] += total
                _read(v_XSd, head * P, pages, offsets_T[row], first_key, num, wide_Bd)
                _add_values(scores_GB, wide_Bd, num, sum_Gd)
            for g in range(G):
                for i in range(d):
                    put(out_TX, row, (head * G + g) * d + i, sum_Gd[g, i] / total_G[g])

    return run


def attend(
    out_THd: torch.Tensor,
    q_THd: torch.Tensor,
    k_KPSd: torch.Tensor,
    v_KPSd: torch.Tensor,
    apart: RowsApart,
    scale: float,
    cap: float,
) -> None:
    """`reference.paged_attention` for some rows of the step, into out_THd. The caller has checked that the cache has
    their pages."""
    num_tokens, num_heads, head_dim = q_THd.shape
    num_kv_heads, num_pages, page_size, _ = k_KPSd.shape
    size = len(apart.rows_R) * num_kv_heads
    _attend(
        q_THd.dtype, size, num_tokens, num_heads, num_kv_heads, head_dim, num_pages, page_size, *exponents(scale, cap),
        q_THd, out_THd, k_KPSd, v_KPSd, apart.rows_R, apart.offsets_T, apart.num_keys_T, apart.pages, len(apart.pages),
        grain=max(1, GRAIN_KEYS * len(apart.rows_R) // apart.num_keys),
    )  # fmt: skip
