"""From a block's projections to attention's inputs in one Triton kernel: queries and keys turned, keys and values into
the cache.

Shapes: T tokens, H query heads, K KV heads, d head size (a power of two), X = (H + 2 K) d, P pages, S slots of a page.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention_worker.kernels.triton_attention import UNSCALED, KVScales

HEADS_AT_ONCE = 8
"""Heads of one program: enough to fill its warps, few enough that a decode step has many programs."""

LARGEST_E4M3 = tl.constexpr(448.0)
"""What is larger is stored as this."""


def rotate_and_store(
    qkv_TX: torch.Tensor,
    cos_T1d: torch.Tensor,
    sin_T1d: torch.Tensor,
    k_KPSd: torch.Tensor,
    v_KPSd: torch.Tensor,
    slots_T: torch.Tensor,
    scales: KVScales = UNSCALED,
) -> torch.Tensor:
    """Turns queries and keys by their positions' angles and stores keys and values in their slots. Returns q_THd.

    slots_T: int64, page * S + offset; the caller has checked that the cache has them. Keys and values are divided by
    `scales` before they are rounded to the cache's type.
    """
    num_kv_heads, num_pages, page_size, head_dim = k_KPSd.shape
    num_rows, num_heads = len(qkv_TX), qkv_TX.shape[1] // head_dim - 2 * num_kv_heads
    assert qkv_TX.is_contiguous() and k_KPSd.is_contiguous() and v_KPSd.is_contiguous()  # noqa: PT018
    q_THd = qkv_TX.new_empty(num_rows, num_heads, head_dim)
    if num_rows:
        with torch.cuda.device_of(qkv_TX):
            rotate_and_store_kernel[(num_rows, triton.cdiv(num_heads + 2 * num_kv_heads, HEADS_AT_ONCE))](
                qkv_TX, cos_T1d, sin_T1d, slots_T, q_THd, k_KPSd, v_KPSd,
                num_pages * page_size, 1 / scales.k, 1 / scales.v,
                HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD=head_dim, BLOCK=HEADS_AT_ONCE, num_warps=4,
            )  # fmt: skip
    return q_THd


@triton.jit
def _narrowed(x, target: tl.constexpr):
    if target == tl.float8e4nv:
        # The format has no infinity. Not tl.clamp, which would make a number of what is none.
        x = tl.where(tl.abs(x) == float("inf"), float("nan"), x)
        x = tl.where(x > LARGEST_E4M3, LARGEST_E4M3, tl.where(x < -LARGEST_E4M3, -LARGEST_E4M3, x))
    return x.to(target)


@triton.jit
def rotate_and_store_kernel(
    qkv_ptr, cos_ptr, sin_ptr, slots_ptr, q_ptr, k_ptr, v_ptr,
    num_slots, k_factor, v_factor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK heads of one token. Grid: (tokens, blocks of heads). Element i turns with i + d / 2; sin is negative in its
    first half."""
    HALF: tl.constexpr = HEAD // 2
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    head = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
    i = tl.arange(0, HALF)[None, :]
    is_q = head < HEADS
    is_k = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_v = (head >= HEADS + KV_HEADS) & (head < ALL)

    x_ptrs = qkv_ptr + (token * ALL + head) * HEAD + i
    left = tl.load(x_ptrs, mask=head < ALL, other=0.0).to(tl.float32)
    right = tl.load(x_ptrs + HALF, mask=head < ALL, other=0.0).to(tl.float32)
    angle = token * HEAD + i
    cos_left, sin_left = tl.load(cos_ptr + angle), tl.load(sin_ptr + angle)
    cos_right, sin_right = tl.load(cos_ptr + angle + HALF), tl.load(sin_ptr + angle + HALF)
    turned_left = left * cos_left + right * sin_left
    turned_right = right * cos_right + left * sin_right

    q_ptrs = q_ptr + (token * HEADS + head) * HEAD + i
    tl.store(q_ptrs, turned_left.to(q_ptr.dtype.element_ty), mask=is_q)
    tl.store(q_ptrs + HALF, turned_right.to(q_ptr.dtype.element_ty), mask=is_q)
    k_ptrs = k_ptr + ((head - HEADS) * num_slots + slot) * HEAD + i
    tl.store(k_ptrs, _narrowed(turned_left * k_factor, k_ptr.dtype.element_ty), mask=is_k)
    tl.store(k_ptrs + HALF, _narrowed(turned_right * k_factor, k_ptr.dtype.element_ty), mask=is_k)
    v_ptrs = v_ptr + ((head - HEADS - KV_HEADS) * num_slots + slot) * HEAD + i
    tl.store(v_ptrs, _narrowed(left * v_factor, v_ptr.dtype.element_ty), mask=is_v)
    tl.store(v_ptrs + HALF, _narrowed(right * v_factor, v_ptr.dtype.element_ty), mask=is_v)
