"""Corrections of low rank on a CPU: a segmented product over rows grouped by adapter, in one loop.

Every sum is one dot product or one chain of additions of fixed order, computed in float32, so a row's bits depend on
the row and its adapter alone; blocks of rows only share what is read.

Shapes: T tokens of the step, I inputs, O outputs of the product, N rows that have an adapter, S segments, R rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from attention_worker.kernels.low_rank import FIRST_OUT, NUM_OUT, RANK, SCALE, Ints, Projections, Segments
from grokmoe.native import array, as_f32, entry, inner, loop, put, share, wide

MOST_ROWS = 8
"""Rows that are computed with one reading of the weights."""

BLOCK = 512
"""Outputs whose sums are kept beside the core while ranks are added."""

AT_ONCE = 4
"""Ranks that are added together: the sums then are loaded and stored a fourth as often. Divides a padded rank."""


@inner
def _into_ranks(x_NI: Any, num: int, a_RI: Any, scale: float, a_I: Any, t_NR: Any) -> None:
    """scale * A x of `num` rows. a_I: room for a row of A."""
    for r in range(a_RI.shape[0]):
        for i in range(a_RI.shape[1]):
            a_I[i] = wide(a_RI[r, i])
        for n in range(num):
            total = np.float32(0.0)
            for i in range(a_RI.shape[1]):
                total += x_NI[n, i] * a_I[i]
            t_NR[n, r] = total * scale


@inner
def _out_of_ranks(t_R: Any, b_RO: Any, first: int, num: int, sum_O: Any) -> None:
    """B t, of `num` outputs from `first` on."""
    for o in range(num):
        sum_O[o] = np.float32(0.0)
    for r in range(0, b_RO.shape[0], AT_ONCE):
        t0, t1, t2, t3 = t_R[r], t_R[r + 1], t_R[r + 2], t_R[r + 3]
        for o in range(num):
            low = t0 * wide(b_RO[r, first + o]) + t1 * wide(b_RO[r + 1, first + o])
            sum_O[o] += low + (t2 * wide(b_RO[r + 2, first + o]) + t3 * wide(b_RO[r + 3, first + o]))


@loop(grain=1)
def _add(element: Any) -> Any:
    @entry
    def run(params: Any) -> None:
        size, T, num_in, num_all, N, S = params[0], params[1], params[2], params[3], params[4], params[5]
        begin, past, num_parts, num_words = params[6], params[7], params[8], params[9]
        most_ranks = params[10]
        x_TI, y_TO = array(element, params[11], (T, num_in)), array(element, params[12], (T, num_all))
        rows_N, blocks = array(np.int64, params[13], (N,)), array(np.int64, params[14], (size, 3))
        table = array(np.int64, params[15], (S, num_parts, num_words))
        x_NI, a_I = np.empty((MOST_ROWS, num_in), np.float32), np.empty(num_in, np.float32)
        t_NR, sum_O = np.empty((MOST_ROWS, most_ranks), np.float32), np.empty(BLOCK, np.float32)
        first, end = share(size)
        for block in range(first, end):
            place, num, segment = blocks[block, 0], blocks[block, 1], blocks[block, 2]
            for n in range(num):
                for i in range(num_in):
                    x_NI[n, i] = wide(x_TI[rows_N[place + n], i])
            for part in range(begin, past):
                rank, num_out = table[segment, part, RANK], table[segment, part, NUM_OUT]
                if rank == 0:
                    continue
                a_RI = array(element, table[segment, part, 0], (rank, num_in))
                b_RO = array(element, table[segment, part, 1], (rank, num_out))
                _into_ranks(x_NI, num, a_RI, as_f32(np.uint32(table[segment, part, SCALE])), a_I, t_NR)
                first_out = table[segment, part, FIRST_OUT]
                for out in range(0, num_out, BLOCK):
                    width = min(BLOCK, num_out - out)
                    for n in range(num):
                        _out_of_ranks(t_NR[n], b_RO, out, width, sum_O)
                        row = rows_N[place + n]
                        for o in range(width):
                            put(y_TO, row, first_out + out + o, wide(y_TO[row, first_out + out + o]) + sum_O[o])

    return run


def add_low_rank(
    y_TO: torch.Tensor, x_TI: torch.Tensor, segments: Segments, layer: int, projections: Projections
) -> None:
    """See `reference.add_low_rank`."""
    assert y_TO.is_contiguous(), "the product is changed in place"
    rows = min(MOST_ROWS, max(1, len(segments.rows_N) // torch.get_num_threads()))
    rows_N, blocks, table = segments.kept(rows, lambda: tuple(map(torch.from_numpy, _tables(segments, rows))))
    num_layers, num_segments, num_parts, num_words = table.shape
    assert layer < num_layers, layer
    _add(
        y_TO.dtype, len(blocks), *x_TI.shape, y_TO.shape[1], len(rows_N), num_segments,
        *projections, num_parts, num_words, int(segments.table_LSPW[layer, ..., RANK].max()),
        x_TI.contiguous(), y_TO, rows_N, blocks, table[layer],
    )  # fmt: skip


def _tables(segments: Segments, rows: int) -> tuple[Ints, Ints, Ints]:
    return segments.rows_N, segments.blocks(rows), segments.table_LSPW
