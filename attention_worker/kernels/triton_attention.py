"""Paged attention in Triton: prefill and decode are one kernel over tiles of different height.

The query heads that share a KV head are rows of one product, so each key is read once for all of them. The cap is
applied to the scores in the kernel; what a softmax does not see is left out:

    cap * tanh(s / cap) = cap - 2 * cap / (1 + exp(2 * s / cap))

so that a weight is 2 to the power of -depth / (1 + 2^(factor * q.k)), from 2^-depth to 1. Where depth is small enough
for float32 (a cap of 30 gives 86.6), no running maximum is needed: sums over parts of the keys simply add up. Larger
caps keep one.

`device_tiles` says which program does what.
Shapes: T tokens of the step, H query heads, K KV heads, P pages, S slots of a page, d head size (a power of two), X
rows of partial sums; in a kernel M rows of a tile, L keys of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from attention_worker.kernels.device_tiles import HEIGHTS, HEIGHTS_FLOAT32, plan_device_tiles
from attention_worker.step_batch import StepBatch, to_device

DEEPEST = 100.0
"""Depth up to which weights are taken as they are: 2^-100 times a value of 10^-7 is still a normal float32."""

NONE_YET = tl.constexpr(-3.0e38)
"""The largest exponent before any was seen."""


@dataclass(frozen=True)
class ProgramTable:
    """`device_tiles.DeviceTiles` on the device, with the page ids that it points into."""

    height: int
    programs_N8: torch.Tensor
    split_R4: torch.Tensor
    num_partial: int
    pages: torch.Tensor


class KVScales(NamedTuple):
    """What stored keys and values are multiplied with; 1 unless they are stored in eight bits."""

    k: float = 1.0
    v: float = 1.0


UNSCALED = KVScales()


def paged_attention(
    q_THd: torch.Tensor,
    k_KPSd: torch.Tensor,
    v_KPSd: torch.Tensor,
    batch: StepBatch,
    scale: float,
    cap: float,
    deterministic: bool = False,
    scales: KVScales = UNSCALED,
) -> torch.Tensor:
    """The function of `reference.paged_attention`. Returns [T, H, d] in q's dtype.

    deterministic: see `device_tiles`. IndexError if a page id is outside the cache.
    """
    batch.check_pages(k_KPSd.shape[1])
    q_THd = q_THd.contiguous()
    out_THd = torch.empty_like(q_THd)
    if len(q_THd):
        key = (q_THd.shape[1] // len(k_KPSd), len(k_KPSd), deterministic)
        tables = batch.kept(key, lambda: _program_tables(batch, *key, q_THd.dtype, q_THd.device))
        attend(out_THd, q_THd, k_KPSd, v_KPSd, tables, scale, cap, scales)
    return out_THd


def _program_tables(
    batch: StepBatch, group: int, num_kv_heads: int, deterministic: bool, dtype: torch.dtype, device: torch.device
) -> tuple[ProgramTable, ...]:
    """One transfer for all of them."""
    heights = HEIGHTS_FLOAT32 if dtype is torch.float32 else HEIGHTS
    plans = plan_device_tiles(batch.spans, group, num_kv_heads, num_processors(device), deterministic, heights)
    arrays = [array for plan in plans for array in (plan.programs_N8, plan.split_R4)]
    parts = [torch.from_numpy(array.reshape(-1)) for array in arrays]
    parts.append(torch.from_numpy(batch.spans.pages.astype(np.int32)))
    *tables, pages = to_device(torch.cat(parts), device).split([len(part) for part in parts])
    return tuple(
        ProgramTable(plan.height, programs.view(-1, 8), split.view(-1, 4), plan.num_partial, pages)
        for plan, programs, split in zip(plans, tables[::2], tables[1::2], strict=True)
    )


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of anything else one, so that nothing is split for them."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def attend(
    out_THd: torch.Tensor,
    q_THd: torch.Tensor,
    k_KPSd: torch.Tensor,
    v_KPSd: torch.Tensor,
    tables: tuple[ProgramTable, ...],
    scale: float,
    cap: float,
    scales: KVScales = UNSCALED,
) -> None:
    """`reference.paged_attention` into out_THd. Queues on the current stream, does not wait.

    q is contiguous, float32 or bfloat16; the caches are contiguous, of q's type or float8_e4m3fn. The caller has
    checked that the cache has the pages.
    """
    _, num_heads, head_dim = q_THd.shape
    num_kv_heads, num_pages, page_size, _ = k_KPSd.shape
    assert head_dim >= 16, f"head size {head_dim}: a product on a GPU takes 16 or more"
    assert head_dim & (head_dim - 1) == 0, f"head size {head_dim} is not a power of two"
    assert k_KPSd.is_contiguous() and v_KPSd.is_contiguous() and q_THd.is_contiguous() and out_THd.is_contiguous()  # noqa: PT018
    factor, depth = 2 * scale * scales.k / cap * math.log2(math.e), 2 * cap * math.log2(math.e)
    running = depth > DEEPEST
    for table in tables:
        num_programs, num_split = len(table.programs_N8), len(table.split_R4)
        sums_XHd = q_THd.new_empty((table.num_partial, num_heads, head_dim), dtype=torch.float32)
        totals_XH2 = q_THd.new_empty((table.num_partial, num_heads, 2), dtype=torch.float32)
        block, num_warps, num_stages = launch_shape(table.height, q_THd.dtype, head_dim)
        with torch.cuda.device_of(q_THd):
            paged_attention_kernel[(num_programs, num_kv_heads)](
                q_THd, k_KPSd, v_KPSd, out_THd, sums_XHd, totals_XH2, table.programs_N8, table.pages,
                factor, depth, scales.v, num_pages * page_size,
                HEADS=num_heads, GROUP=num_heads // num_kv_heads, HEAD=head_dim, PAGE=page_size, RUNNING=running,
                BLOCK_M=table.height, BLOCK_L=block, num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
            if num_split:
                add_up_kernel[(num_split, num_heads)](
                    sums_XHd, totals_XH2, out_THd, table.split_R4, scales.v,
                    HEADS=num_heads, HEAD=head_dim, RUNNING=running, num_warps=1,
                )  # fmt: skip


def launch_shape(height: int, dtype: torch.dtype, head_dim: int) -> tuple[int, int, int]:
    """(keys of a block, warps, pipeline stages) for tiles of that height. Tests assert that each fits each
    architecture; none has been timed yet."""
    if dtype is torch.float32:
        return 32, 4, 2
    if height <= HEIGHTS.low:
        return 64, 4, 3 if head_dim <= 64 else 2
    return 64, 8, 2


@triton.jit
def paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, sums_ptr, totals_ptr, programs_ptr, pages_ptr,
    factor, depth, v_scale, num_slots,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, RUNNING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One tile of rows over one range of keys, all heads of one KV head. Grid: (programs, KV heads)."""
    program_ptr = programs_ptr + tl.program_id(0) * 8
    first_row = tl.load(program_ptr).to(tl.int64)
    num_tokens = tl.load(program_ptr + 1)
    position = tl.load(program_ptr + 2)
    pages_ptr += tl.load(program_ptr + 3)
    first_key = tl.load(program_ptr + 4)
    end_key = tl.load(program_ptr + 5)
    partial = tl.load(program_ptr + 6).to(tl.int64)
    kv_head = tl.program_id(1)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD)
    token = m // GROUP
    m_ok = (token < num_tokens)[:, None]
    # Of the first row's position among all rows times heads.
    head_row = token * HEADS + kv_head * GROUP + m % GROUP
    within = head_row[:, None] * HEAD + d[None, :]
    q = tl.load(q_ptr + first_row * HEADS * HEAD + within, mask=m_ok, other=0.0)
    head_slot = kv_head.to(tl.int64) * num_slots

    acc = tl.zeros((BLOCK_M, HEAD), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), NONE_YET, tl.float32)
    for first in range(first_key, end_key, BLOCK_L):
        key = first + tl.arange(0, BLOCK_L)
        key_ok = key < end_key
        page = tl.load(pages_ptr + key // PAGE, mask=key_ok, other=0).to(tl.int64)
        slot = (head_slot + page * PAGE + key % PAGE) * HEAD
        k = tl.load(k_ptr + slot[None, :] + d[:, None], mask=key_ok[None, :], other=0.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee")
        exponents = -depth / (1 + tl.exp2(scores * factor))
        is_seen = (key[None, :] <= position + token[:, None]) & key_ok[None, :]
        exponents = tl.where(is_seen, exponents, float("-inf"))
        if RUNNING:
            before = largest
            largest = tl.maximum(largest, tl.max(exponents, 1))
            fading = tl.exp2(before - largest)
            acc *= fading[:, None]
            total *= fading
            exponents -= largest[:, None]
        weights = tl.exp2(exponents)
        total += tl.sum(weights, 1)
        # Slots that hold no token are not read: zero times what is there may be no number.
        v = tl.load(v_ptr + slot[:, None] + d[None, :], mask=key_ok[:, None], other=0.0)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")

    if partial < 0:
        out = acc * (v_scale / total)[:, None]
        tl.store(out_ptr + first_row * HEADS * HEAD + within, out.to(out_ptr.dtype.element_ty), mask=m_ok)
    else:
        tl.store(sums_ptr + partial * HEADS * HEAD + within, acc, mask=m_ok)
        row_ok = token < num_tokens
        total_ptrs = totals_ptr + (partial * HEADS + head_row) * 2
        tl.store(total_ptrs, total, mask=row_ok)
        tl.store(total_ptrs + 1, largest, mask=row_ok)


@triton.jit
def add_up_kernel(
    sums_ptr, totals_ptr, out_ptr, rows_ptr, v_scale, HEADS: tl.constexpr, HEAD: tl.constexpr, RUNNING: tl.constexpr
):  # fmt: skip
    """One row and head from its partial sums, in the order of the keys. Grid: (rows, query heads)."""
    row_ptr = rows_ptr + tl.program_id(0) * 4
    row = tl.load(row_ptr).to(tl.int64)
    first = tl.load(row_ptr + 1).to(tl.int64)
    step = tl.load(row_ptr + 2)
    count = tl.load(row_ptr + 3)
    head = tl.program_id(1)
    d = tl.arange(0, HEAD)

    largest = NONE_YET
    if RUNNING:
        for part in range(count):
            largest = tl.maximum(largest, tl.load(totals_ptr + ((first + part * step) * HEADS + head) * 2 + 1))
    acc = tl.zeros((HEAD,), tl.float32)
    total = 0.0
    for part in range(count):
        at = (first + part * step) * HEADS + head
        weight = 1.0
        if RUNNING:
            weight = tl.exp2(tl.load(totals_ptr + at * 2 + 1) - largest)
        acc += weight * tl.load(sums_ptr + at * HEAD + d)
        total += weight * tl.load(totals_ptr + at * 2)
    out = acc * (v_scale / total)
    tl.store(out_ptr + (row * HEADS + head) * HEAD + d, out.to(out_ptr.dtype.element_ty))
