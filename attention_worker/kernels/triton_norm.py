"""Root-mean-square norms in Triton, float32 inside: into a block, out of it onto the residual, and both in one pass.

A program computes one row, so a row's bits depend on the row alone.
Shapes: T tokens, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ELEMENTS_PER_THREAD = 16
"""A row is held in registers: so many values of each thread."""


def norm(h_TD: torch.Tensor, gain_D: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """gain * h / sqrt(mean(h^2) + eps) over the last dimension; h and gain are float32, the result is of `dtype`."""
    out_TD = h_TD.new_empty(h_TD.shape, dtype=dtype)
    _launch(h_TD, None, out_TD, gain_D, gain_D, eps)
    return out_TD


def add_normed(h_TD: torch.Tensor, y_TD: torch.Tensor, gain_D: torch.Tensor, eps: float) -> None:
    """Adds the norm of y to h, in place. h and gain are float32."""
    _launch(h_TD, y_TD, None, gain_D, gain_D, eps)


def add_normed_then_norm(
    h_TD: torch.Tensor,
    y_TD: torch.Tensor,
    y_gain_D: torch.Tensor,
    h_gain_D: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`add_normed` with y_gain, then `norm` of the sum with h_gain."""
    out_TD = h_TD.new_empty(h_TD.shape, dtype=dtype)
    _launch(h_TD, y_TD, out_TD, y_gain_D, h_gain_D, eps)
    return out_TD


def _launch(
    h_TD: torch.Tensor,
    y_TD: torch.Tensor | None,
    out_TD: torch.Tensor | None,
    y_gain_D: torch.Tensor,
    h_gain_D: torch.Tensor,
    eps: float,
) -> None:
    num_rows, width = h_TD.shape
    assert h_TD.is_contiguous(), "the residual is changed in place"
    y_TD = None if y_TD is None else y_TD.contiguous()
    if not num_rows:
        return
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(h_TD):
        norm_kernel[(num_rows,)](
            h_TD, h_TD if y_TD is None else y_TD, h_TD if out_TD is None else out_TD, y_gain_D, h_gain_D, eps, width,
            ADDS=y_TD is not None, NORMS=out_TD is not None, BLOCK=block,
            num_warps=min(16, max(1, block // (32 * ELEMENTS_PER_THREAD))),
        )  # fmt: skip


@triton.jit
def norm_kernel(
    h_ptr, y_ptr, out_ptr, y_gain_ptr, h_gain_ptr, eps, D,
    ADDS: tl.constexpr, NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: adds y's norm to h, writes h's norm to out, or both in this order. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    ok = i < D
    h = tl.load(h_ptr + row * D + i, mask=ok, other=0.0)
    if ADDS:
        y = tl.load(y_ptr + row * D + i, mask=ok, other=0.0).to(tl.float32)
        factor = 1 / tl.sqrt(tl.sum(y * y, 0) / D + eps)
        h += y * factor * tl.load(y_gain_ptr + i, mask=ok, other=0.0)
        tl.store(h_ptr + row * D + i, h, mask=ok)
    if NORMS:
        factor = 1 / tl.sqrt(tl.sum(h * h, 0) / D + eps)
        out = h * factor * tl.load(h_gain_ptr + i, mask=ok, other=0.0)
        tl.store(out_ptr + row * D + i, out.to(out_ptr.dtype.element_ty), mask=ok)
