"""Corrections of low rank in two Triton kernels: rows into ranks, ranks onto the product's outputs.

A program computes up to 16 rows that have the same adapter. The first kernel cuts the inputs into a fixed number of
parts, so that a few rows find many processors; the second adds the parts up in their order. Ranks are taken 16 at a
time. So a row's bits depend on the row and its adapter alone.

Shapes: T tokens, N rows that have an adapter, S segments, P projections of the product, I inputs, O outputs, C parts of
the inputs, R ranks, padded to those of the largest adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from attention_worker.kernels import low_rank
from attention_worker.kernels.low_rank import Projections, Segments
from attention_worker.step_batch import to_device

BLOCK_ROWS = 16
"""Rows of a program: the least that a product on a GPU takes."""

INPUT_PARTS = 4
"""Into which the inputs are cut."""

BLOCK_I, BLOCK_I_FLOAT32 = 128, 32
"""Inputs in one step. Float32 is computed by the ordinary units, from registers."""

BLOCK_O = 128
"""Outputs of a program."""

RANK_STEP = 16


@dataclass(frozen=True)
class _Tables:
    """What the kernels look up, int64, on the device: blocks of rows, the rows, the weights of each layer.

    most_ranks, most_outs: of any adapter; the latter per projection. is_aligned: whether outputs can be loaded and
    stored several at a time.
    """

    blocks_B3: torch.Tensor
    rows_N: torch.Tensor
    weights_LSPW: torch.Tensor
    most_ranks: int
    most_outs: tuple[int, ...]
    is_aligned: bool


def _tables(segments: Segments, device: torch.device) -> _Tables:
    """One transfer for all layers."""
    table = segments.table_LSPW
    arrays = [segments.blocks(BLOCK_ROWS).reshape(-1), segments.rows_N, table.reshape(-1)]
    joined = to_device(torch.from_numpy(np.concatenate(arrays)), device)
    blocks, rows_N, weights = joined.split([len(array) for array in arrays])
    return _Tables(
        blocks.view(-1, 3),
        rows_N,
        weights.view(table.shape),
        int(table[..., low_rank.RANK].max()),
        tuple(table[..., low_rank.NUM_OUT].max(axis=(0, 1)).tolist()),
        not (table[..., [low_rank.FIRST_OUT, low_rank.NUM_OUT]] % 16).any(),
    )


def add_low_rank(
    y_TO: torch.Tensor, x_TI: torch.Tensor, segments: Segments, layer: int, projections: Projections
) -> None:
    """See `reference.add_low_rank`. Queues on the current stream, does not wait."""
    assert y_TO.stride(1) == 1 and x_TI.stride(1) == 1  # noqa: PT018
    tables = segments.kept("triton", lambda: _tables(segments, y_TO.device))
    num_parts, num_rows, num_in = projections.end - projections.begin, len(tables.rows_N), x_TI.shape[1]
    most_outs = max(tables.most_outs[slice(*projections)])
    if not most_outs:
        return
    # A row of the table: [segment, projection of all four, word].
    weights, sizes = tables.weights_LSPW.select(0, layer), {"PARTS": num_parts, "FIRST_PART": projections.begin}
    ranks_CNPR = x_TI.new_empty((INPUT_PARTS, num_rows, num_parts, tables.most_ranks), dtype=torch.float32)
    block_i = BLOCK_I_FLOAT32 if x_TI.dtype is torch.float32 else BLOCK_I
    part = triton.cdiv(triton.cdiv(num_in, INPUT_PARTS), block_i) * block_i
    with torch.cuda.device_of(y_TO):
        into_ranks_kernel[(len(tables.blocks_B3), num_parts, INPUT_PARTS)](
            x_TI, ranks_CNPR, tables.blocks_B3, tables.rows_N, weights, num_in, part, x_TI.stride(0), num_rows,
            tables.most_ranks, **sizes, BLOCK_ROWS=BLOCK_ROWS, BLOCK_I=block_i, RANK_STEP=RANK_STEP, num_warps=4,
        )  # fmt: skip
        out_of_ranks_kernel[(len(tables.blocks_B3), triton.cdiv(most_outs, BLOCK_O), num_parts)](
            ranks_CNPR, y_TO, tables.blocks_B3, tables.rows_N, weights, y_TO.stride(0), num_rows, tables.most_ranks,
            **sizes, INPUT_PARTS=INPUT_PARTS, ALIGNED=tables.is_aligned, BLOCK_ROWS=BLOCK_ROWS, BLOCK_O=BLOCK_O,
            RANK_STEP=RANK_STEP, num_warps=4,
        )  # fmt: skip


PROJECTIONS, WORDS = tl.constexpr(4), tl.constexpr(6)
RANK, FIRST_OUT = tl.constexpr(low_rank.RANK), tl.constexpr(low_rank.FIRST_OUT)
NUM_OUT, SCALE = tl.constexpr(low_rank.NUM_OUT), tl.constexpr(low_rank.SCALE)


@triton.jit
def into_ranks_kernel(
    x_ptr, ranks_ptr, blocks_ptr, rows_ptr, weights_ptr, num_in, part_size, x_stride_t, num_rows, most_ranks,
    PARTS: tl.constexpr, FIRST_PART: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_I: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """scale * A x over one part of the inputs. Grid: (blocks of rows, projections, parts of the inputs)."""
    place = tl.load(blocks_ptr + tl.program_id(0) * 3)
    count = tl.load(blocks_ptr + tl.program_id(0) * 3 + 1)
    segment = tl.load(blocks_ptr + tl.program_id(0) * 3 + 2)
    projection = tl.program_id(1)
    input_part = tl.program_id(2)
    entry_ptr = weights_ptr + (segment * PROJECTIONS + FIRST_PART + projection) * WORDS
    a_ptr = tl.multiple_of(tl.load(entry_ptr).to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
    rank = tl.load(entry_ptr + RANK).to(tl.int32)
    scale = tl.load(entry_ptr + SCALE).to(tl.int32).to(tl.float32, bitcast=True)

    m = tl.arange(0, BLOCK_ROWS)
    m_ok = m < count
    row = tl.load(rows_ptr + place + m, mask=m_ok, other=0)
    r = tl.arange(0, RANK_STEP)
    begin = input_part * part_size
    end = tl.minimum(begin + part_size, num_in)
    for first_rank in range(0, rank, RANK_STEP):
        acc = tl.zeros((BLOCK_ROWS, RANK_STEP), tl.float32)
        for first in range(begin, end, BLOCK_I):
            i = first + tl.arange(0, BLOCK_I)
            i_ok = i < end
            x = tl.load(x_ptr + row[:, None] * x_stride_t + i[None, :], mask=m_ok[:, None] & i_ok[None, :], other=0.0)
            a = tl.load(a_ptr + (first_rank + r)[None, :] * num_in + i[:, None], mask=i_ok[:, None], other=0.0)
            acc = tl.dot(x, a, acc, input_precision="ieee")
        out = ((input_part.to(tl.int64) * num_rows + place + m) * PARTS + projection) * most_ranks + first_rank
        tl.store(ranks_ptr + out[:, None] + r[None, :], acc * scale, mask=m_ok[:, None])


@triton.jit
def out_of_ranks_kernel(
    ranks_ptr, y_ptr, blocks_ptr, rows_ptr, weights_ptr, y_stride_t, num_rows, most_ranks,
    PARTS: tl.constexpr, FIRST_PART: tl.constexpr, INPUT_PARTS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_O: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """y += B t, where t is the sum of the parts. Grid: (blocks of rows, blocks of outputs, projections)."""
    place = tl.load(blocks_ptr + tl.program_id(0) * 3)
    count = tl.load(blocks_ptr + tl.program_id(0) * 3 + 1)
    segment = tl.load(blocks_ptr + tl.program_id(0) * 3 + 2)
    projection = tl.program_id(2)
    entry_ptr = weights_ptr + (segment * PROJECTIONS + FIRST_PART + projection) * WORDS
    num_out = tl.load(entry_ptr + NUM_OUT).to(tl.int32)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    if tl.program_id(1) * BLOCK_O < num_out:  # an absent projection has no outputs
        b_ptr = tl.multiple_of(tl.load(entry_ptr + 1).to(tl.pointer_type(y_ptr.dtype.element_ty)), 16)
        rank = tl.load(entry_ptr + RANK).to(tl.int32)
        first_out = tl.load(entry_ptr + FIRST_OUT)
        if ALIGNED:
            num_out, first_out = tl.multiple_of(num_out, 16), tl.multiple_of(first_out, 16)
        o_ok = o < num_out
        m = tl.arange(0, BLOCK_ROWS)
        m_ok = m < count
        row = tl.load(rows_ptr + place + m, mask=m_ok, other=0)
        r = tl.arange(0, RANK_STEP)
        acc = tl.zeros((BLOCK_ROWS, BLOCK_O), tl.float32)
        for first_rank in range(0, rank, RANK_STEP):
            t = tl.zeros((BLOCK_ROWS, RANK_STEP), tl.float32)
            for part in tl.static_range(INPUT_PARTS):
                at = ((part * num_rows + place + m) * PARTS + projection) * most_ranks + first_rank
                t += tl.load(ranks_ptr + at[:, None] + r[None, :], mask=m_ok[:, None], other=0.0)
            b = tl.load(b_ptr + (first_rank + r)[:, None] * num_out + o[None, :], mask=o_ok[None, :], other=0.0)
            high = t.to(b.dtype)
            acc = tl.dot(high, b, acc, input_precision="ieee")
            if b.dtype != tl.float32:  # what rounding the ranks has lost: a second product costs next to nothing
                acc = tl.dot((t - high.to(tl.float32)).to(b.dtype), b, acc)
        y_ptrs = y_ptr + row[:, None] * y_stride_t + first_out + o[None, :]
        ok = m_ok[:, None] & o_ok[None, :]
        y = tl.load(y_ptrs, mask=ok, other=0.0).to(tl.float32)
        tl.store(y_ptrs, (y + acc).to(y_ptr.dtype.element_ty), mask=ok)
