"""The grouped GEMM in Triton: rows sorted by expert, each through a matrix of its expert, or through two at once.

    not GATED    out = x W^T
    GATED        out = gelu(x W^T) * (x V^T)     both products in one pass over x, the rest in the epilogue

Work is a list of (row tile, block of output columns). There are as many programs as the chip holds, and each takes
every so manieth piece, so that uneven routings fill the chip as even ones do. A tile is a run of rows of one expert;
`grouped_tiles` lists them on the host, where the counts are. Nothing is split along the contraction and nothing is
added atomically, so a result does not depend on timing, nor on what other rows are there, but for the tile class.

    SWAP    weights are the left operand: out^T = W x^T. A tensor core of Hopper takes 64 rows at least and 8 columns at
            least, so few rows go where the columns are.
    TMA     blocks are fetched by the copy engine of sm_90 and later, from descriptors of two-dimensional tensors; the
            experts' matrices lie one below the other. Without it, through pointers with any strides.
    Scales  of weights in eight bits one per output column, of rows in eight bits one per row; both are factors of the
            finished product.

Shapes: N rows, E experts held, K contraction, C output columns of an expert.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    """tanh is spelled out: libdevice's has no counterpart in the interpreter."""
    if TANH:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        factor = 1 + (1 - 2 / (tl.exp(2 * inner) + 1))
    else:
        factor = 1 + tl.erf(x * 0.7071067811865476)
    return 0.5 * x * factor


@triton.jit
def _add_product(x, w, acc, SWAP: tl.constexpr):
    """acc += x w^T, or its transpose. Weights in fewer bits than the rows are widened first."""
    if w.dtype == tl.uint8:
        # The bits of a float8_e4m3fn for a device that does not know it: with its exponent and fraction where a
        # bfloat16 has them, it is 2^120 times too small, subnormal numbers too.
        bits = w.to(tl.int16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 4)
        w = bits.to(tl.bfloat16, bitcast=True) * (2.0**120)
    if w.dtype != x.dtype:
        w = w.to(x.dtype)
    if SWAP:
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def _scaled(acc, scale_ptr, scale_ok, row_scales, HAS_SCALES: tl.constexpr, HAS_ROW_SCALES: tl.constexpr):
    """acc [N, C] times its scales."""
    if HAS_SCALES:
        acc *= tl.load(scale_ptr, mask=scale_ok, other=0.0)[None, :]
    if HAS_ROW_SCALES:
        acc *= row_scales[:, None]
    return acc


@triton.jit
def grouped_kernel(
    x, w, v, out_ptr, tiles_ptr, x_scale_ptr, w_scale_ptr, v_scale_ptr,
    num_tiles, K, C,
    x_stride_n, w_stride_e, w_stride_c, v_stride_e, v_stride_c, out_stride_n,
    GATED: tl.constexpr, TANH: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
    HAS_SCALES: tl.constexpr, HAS_ROW_SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """See the module. x, w and v are pointers or descriptors. Grid: (programs,)."""
    n = tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    ROWS: tl.constexpr = BLOCK_C if SWAP else BLOCK_N
    COLUMNS: tl.constexpr = BLOCK_N if SWAP else BLOCK_C
    for work in range(tl.program_id(0), num_tiles * tl.cdiv(C, BLOCK_C), tl.num_programs(0)):
        # Row tiles vary fastest, so programs that read the same columns of an expert's weights run side by side.
        tile_ptr = tiles_ptr + work % num_tiles * 3
        expert = tl.load(tile_ptr)
        first_row = tl.load(tile_ptr + 1)
        num_rows = tl.load(tile_ptr + 2) - first_row
        first_c = work // num_tiles * BLOCK_C
        n_ok = n < num_rows
        c_ok = c < C - first_c
        if not TMA:
            # 64 bits for what reaches across experts or rows: E * C * K and N * K may pass 2^31. A tile stays below.
            expert_64, row_64, c_64 = expert.to(tl.int64), first_row.to(tl.int64), first_c.to(tl.int64)
            x_ptrs = x + row_64 * x_stride_n + n[:, None] * x_stride_n + k[None, :]
            w_ptrs = w + expert_64 * w_stride_e + c_64 * w_stride_c + c[:, None] * w_stride_c + k[None, :]
            if GATED:
                v_ptrs = v + expert_64 * v_stride_e + c_64 * v_stride_c + c[:, None] * v_stride_c + k[None, :]

        w_acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        if GATED:
            v_acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first_k in range(0, K, BLOCK_K):
            if TMA:
                x_block = x.load([first_row, first_k])
                w_acc = _add_product(x_block, w.load([expert * C + first_c, first_k]), w_acc, SWAP)
                if GATED:
                    v_acc = _add_product(x_block, v.load([expert * C + first_c, first_k]), v_acc, SWAP)
            else:
                k_ok = (k < K - first_k)[None, :]
                x_block = tl.load(x_ptrs + first_k, mask=n_ok[:, None] & k_ok, other=0.0)
                w_block = tl.load(w_ptrs + first_k, mask=c_ok[:, None] & k_ok, other=0.0)
                w_acc = _add_product(x_block, w_block, w_acc, SWAP)
                if GATED:
                    v_block = tl.load(v_ptrs + first_k, mask=c_ok[:, None] & k_ok, other=0.0)
                    v_acc = _add_product(x_block, v_block, v_acc, SWAP)

        row_scales = tl.full((BLOCK_N,), 1.0, tl.float32)
        if HAS_ROW_SCALES:
            row_scales = tl.load(x_scale_ptr + first_row + n, mask=n_ok, other=0.0)
        at_c = expert * C + first_c + c
        if SWAP:
            w_acc = tl.trans(w_acc)
        out = _scaled(w_acc, w_scale_ptr + at_c, c_ok, row_scales, HAS_SCALES, HAS_ROW_SCALES)
        if GATED:
            if SWAP:
                v_acc = tl.trans(v_acc)
            v_out = _scaled(v_acc, v_scale_ptr + at_c, c_ok, row_scales, HAS_SCALES, HAS_ROW_SCALES)
            out = _gelu(out, TANH) * v_out
        out_ptrs = out_ptr + first_row.to(tl.int64) * out_stride_n + first_c + n[:, None] * out_stride_n + c[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=n_ok[:, None] & c_ok[None, :])
