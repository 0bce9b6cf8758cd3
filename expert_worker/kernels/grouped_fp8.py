"""Rows in eight bits, float8_e4m3fn with one scale per row, in Triton. `reference.quantise_rows` is the definition.

Shapes: N rows, K columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048
"""Columns in one step."""

LARGEST = tl.constexpr(448.0)
"""The largest number of the format."""


def quantise_rows(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.quantise_rows`. Queued on the current stream."""
    num_rows, width = x_NK.shape
    assert x_NK.stride(1) == 1, "a row's values are not next to each other"
    q_NK = x_NK.new_empty(x_NK.shape, dtype=torch.float8_e4m3fn)
    scale_N = x_NK.new_empty(num_rows, dtype=torch.float32)
    if num_rows:
        with torch.cuda.device_of(x_NK):
            quantise_rows_kernel[(num_rows,)](
                x_NK, q_NK, scale_N, width, x_NK.stride(0),
                BLOCK=min(BLOCK, triton.next_power_of_2(width)), num_warps=4,
            )  # fmt: skip
    return q_NK, scale_N


@triton.jit
def quantise_rows_kernel(x_ptr, q_ptr, scale_ptr, K, x_stride_n, BLOCK: tl.constexpr):
    """One row, read twice. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    largest_k = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, K, BLOCK):
        x = tl.load(x_ptr + row * x_stride_n + first + k, mask=k < K - first, other=0.0).to(tl.float32)
        largest_k = tl.maximum(largest_k, tl.abs(x))
    largest = tl.max(largest_k, 0)
    scale = tl.where(largest > 0, largest / LARGEST, 1.0)
    tl.store(scale_ptr + row, scale)
    for first in range(0, K, BLOCK):
        x = tl.load(x_ptr + row * x_stride_n + first + k, mask=k < K - first, other=0.0).to(tl.float32)
        # What is no number stays none: the format has a NaN, and infinity over an infinite scale is one.
        tl.store(q_ptr + row * K + first + k, (x / scale).to(tl.float8e4nv), mask=k < K - first)
