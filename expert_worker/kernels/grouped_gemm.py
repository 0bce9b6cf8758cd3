"""Grouped GEMM in Triton: the MLPs of several experts over rows sorted by expert, in two launches.

    gate_up_kernel   h = gelu(x W^T) * (x V^T)     both products in one pass over x, the rest in the epilogue
    down_kernel      y = h W2^T

A program computes one tile: at most BLOCK_N rows of one expert, times some output columns, over the whole
contraction. Nothing is split along the contraction and nothing is added atomically, so a result does not
depend on timing, nor on what other rows are there, but for the tile class (see `tile_class`).

Which rows make a tile is worked out on the host, where the counts are. Searching prefix sums of the counts
in the kernel would take a transfer too, spare programs in the grid, and a loop at the head of every
program.

Loads go through pointers, not TMA descriptors: the same code serves sm_80 and up, and AMD.
Shapes: N rows, E experts held, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from expert_worker.kernels.reference import assert_consistent
from grokmoe.model_config import Gelu


class Blocks(NamedTuple):
    """How one kernel is cut: output columns of a program, contraction step, warps and pipeline stages."""

    columns: int
    depth: int
    num_warps: int
    num_stages: int


class TileClass(NamedTuple):
    """Rows of a tile, and how both kernels are cut for tiles of that height."""

    rows: int
    gate_up: Blocks
    down: Blocks


# Ascending in rows. Tests assert that each entry fits each architecture; none has been timed yet. gfx942
# has 64 KiB of shared memory, and more columns in the tall class would spill on sm_80.
TILE_CLASSES: dict[torch.dtype, tuple[TileClass, ...]] = {
    torch.bfloat16: (
        TileClass(16, gate_up=Blocks(64, 64, 4, 4), down=Blocks(64, 128, 4, 4)),
        TileClass(64, gate_up=Blocks(64, 64, 4, 3), down=Blocks(128, 64, 4, 3)),
        TileClass(128, gate_up=Blocks(64, 64, 8, 3), down=Blocks(128, 64, 8, 3)),
    ),
    torch.float32: (
        TileClass(16, gate_up=Blocks(32, 32, 4, 3), down=Blocks(32, 32, 4, 3)),
        TileClass(64, gate_up=Blocks(32, 32, 4, 3), down=Blocks(64, 32, 4, 3)),
    ),
}


def expert_mlp(
    rows_ND: torch.Tensor,
    counts_E: Sequence[int],
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
    gelu: Gelu,
    fixed_tiles: bool = False,
) -> torch.Tensor:
    """Passes each row through the MLP of its expert. Arguments and result: see `reference.expert_mlp`.

    fixed_tiles: whether all calls use the lowest tile, so that a row's bits do not depend on the rows beside it.

    The innermost stride of every tensor must be 1; the others are free, so slices of F or D need no copy.
    """
    assert_consistent(rows_ND, counts_E, gate_EFD, up_EFD, down_EDF)
    h_NF = rows_ND.new_empty(len(rows_ND), gate_EFD.shape[1])
    out_ND = rows_ND.new_empty(rows_ND.shape)
    launch(rows_ND, counts_E, gate_EFD, up_EFD, down_EDF, gelu, h_NF, out_ND, fixed_tiles)
    return out_ND


def launch(
    rows_ND: torch.Tensor,
    counts_E: Sequence[int],
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
    gelu: Gelu,
    h_NF: torch.Tensor,
    out_ND: torch.Tensor,
    fixed_tiles: bool = False,
) -> None:
    """Queues both kernels on the current stream; h_NF and out_ND are overwritten. Does not wait."""
    for tensor in (rows_ND, gate_EFD, up_EFD, down_EDF, h_NF, out_ND):
        assert tensor.stride(-1) == 1, f"innermost stride is {tensor.stride(-1)}, must be 1"
    if len(rows_ND) == 0:
        return
    _, F, D = gate_EFD.shape
    shape = TILE_CLASSES[rows_ND.dtype][0] if fixed_tiles else tile_class(counts_E, rows_ND.dtype)
    tiles = tile_table(counts_E, shape.rows)
    # Pinned and non-blocking: a copy from pageable memory would wait for the kernels queued before it.
    table = torch.tensor(tiles, dtype=torch.int32, pin_memory=rows_ND.is_cuda)
    table = table.to(rows_ND.device, non_blocking=True)

    # Row tiles vary fastest, so programs that read the same columns of an expert's weights run side by side.
    with torch.cuda.device_of(rows_ND):
        gate_up_kernel[(len(tiles), triton.cdiv(F, shape.gate_up.columns))](
            rows_ND, gate_EFD, up_EFD, h_NF, table,
            D, F,
            rows_ND.stride(0), gate_EFD.stride(0), gate_EFD.stride(1), up_EFD.stride(0), up_EFD.stride(1),
            h_NF.stride(0),
            TANH=gelu is Gelu.TANH,
            BLOCK_N=shape.rows, BLOCK_F=shape.gate_up.columns, BLOCK_D=shape.gate_up.depth,
            num_warps=shape.gate_up.num_warps, num_stages=shape.gate_up.num_stages,
        )  # fmt: skip
        down_kernel[(len(tiles), triton.cdiv(D, shape.down.columns))](
            h_NF, down_EDF, out_ND, table,
            D, F,
            h_NF.stride(0), down_EDF.stride(0), down_EDF.stride(1), out_ND.stride(0),
            BLOCK_N=shape.rows, BLOCK_D=shape.down.columns, BLOCK_F=shape.down.depth,
            num_warps=shape.down.num_warps, num_stages=shape.down.num_stages,
        )  # fmt: skip


def tile_class(counts_E: Sequence[int], dtype: torch.dtype) -> TileClass:
    """The lowest tile that holds the busiest expert's rows, else the highest.

    By the busiest expert because its weights are read once per row tile, and weights dominate the traffic;
    rows that a tile has too many cost arithmetic only. The last bits of a row may depend on the class, and
    on nothing else in the batch.
    """
    classes = TILE_CLASSES[dtype]
    return next((shape for shape in classes if shape.rows >= max(counts_E)), classes[-1])


def tile_table(counts_E: Sequence[int], block_rows: int) -> list[tuple[int, int, int]]:
    """Per tile: expert, first row, one past the expert's last. Each row is in one tile; no tile is empty."""
    tiles = []
    begin = 0
    for expert, count in enumerate(counts_E):
        end = begin + count
        tiles += [(expert, first, end) for first in range(begin, end, block_rows)]
        begin = end
    return tiles


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
def gate_up_kernel(
    rows_ptr, gate_ptr, up_ptr, h_ptr, tiles_ptr,
    D, F,
    rows_stride_n, gate_stride_e, gate_stride_f, up_stride_e, up_stride_f, h_stride_n,
    TANH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h = gelu(x W^T) * (x V^T) for one tile of rows and BLOCK_F columns. Grid: (tiles, blocks of F)."""
    # 64 bits for what reaches across experts or rows: E * F * D and N * F may pass 2^31. A tile stays below.
    tile_ptr = tiles_ptr + tl.program_id(0) * 3
    expert = tl.load(tile_ptr).to(tl.int64)
    first_row = tl.load(tile_ptr + 1).to(tl.int64)
    num_rows = tl.load(tile_ptr + 2) - first_row
    first_f = tl.program_id(1).to(tl.int64) * BLOCK_F

    n = tl.arange(0, BLOCK_N)
    f = tl.arange(0, BLOCK_F)
    d = tl.arange(0, BLOCK_D)
    n_ok = n < num_rows
    f_ok = f < F - first_f
    gate_ptr += expert * gate_stride_e + first_f * gate_stride_f
    up_ptr += expert * up_stride_e + first_f * up_stride_f
    x_ptrs = rows_ptr + first_row * rows_stride_n + n[:, None] * rows_stride_n + d[None, :]
    gate_ptrs = gate_ptr + f[None, :] * gate_stride_f + d[:, None]
    up_ptrs = up_ptr + f[None, :] * up_stride_f + d[:, None]

    gate_acc = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    up_acc = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for first_d in range(0, D, BLOCK_D):
        d_ok = d < D - first_d
        w_ok = d_ok[:, None] & f_ok[None, :]
        x = tl.load(x_ptrs, mask=n_ok[:, None] & d_ok[None, :], other=0.0)
        gate_acc = tl.dot(x, tl.load(gate_ptrs, mask=w_ok, other=0.0), gate_acc, input_precision="ieee")
        up_acc = tl.dot(x, tl.load(up_ptrs, mask=w_ok, other=0.0), up_acc, input_precision="ieee")
        x_ptrs += BLOCK_D
        gate_ptrs += BLOCK_D
        up_ptrs += BLOCK_D

    h = (_gelu(gate_acc, TANH) * up_acc).to(h_ptr.dtype.element_ty)
    h_ptrs = h_ptr + first_row * h_stride_n + first_f + n[:, None] * h_stride_n + f[None, :]
    tl.store(h_ptrs, h, mask=n_ok[:, None] & f_ok[None, :])


@triton.jit
def down_kernel(
    h_ptr, down_ptr, out_ptr, tiles_ptr,
    D, F,
    h_stride_n, down_stride_e, down_stride_d, out_stride_n,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """y = h W2^T for one tile of rows and BLOCK_D columns. Grid: (tiles, blocks of D)."""
    tile_ptr = tiles_ptr + tl.program_id(0) * 3
    expert = tl.load(tile_ptr).to(tl.int64)
    first_row = tl.load(tile_ptr + 1).to(tl.int64)
    num_rows = tl.load(tile_ptr + 2) - first_row
    first_d = tl.program_id(1).to(tl.int64) * BLOCK_D

    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    f = tl.arange(0, BLOCK_F)
    n_ok = n < num_rows
    d_ok = d < D - first_d
    down_ptr += expert * down_stride_e + first_d * down_stride_d
    h_ptrs = h_ptr + first_row * h_stride_n + n[:, None] * h_stride_n + f[None, :]
    down_ptrs = down_ptr + d[None, :] * down_stride_d + f[:, None]

    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first_f in range(0, F, BLOCK_F):
        f_ok = f < F - first_f
        h = tl.load(h_ptrs, mask=n_ok[:, None] & f_ok[None, :], other=0.0)
        w = tl.load(down_ptrs, mask=f_ok[:, None] & d_ok[None, :], other=0.0)
        acc = tl.dot(h, w, acc, input_precision="ieee")
        h_ptrs += BLOCK_F
        down_ptrs += BLOCK_F

    out_ptrs = out_ptr + first_row * out_stride_n + first_d + n[:, None] * out_stride_n + d[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=n_ok[:, None] & d_ok[None, :])
