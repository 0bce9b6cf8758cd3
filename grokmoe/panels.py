"""A weight cut into panels, and rows through it: bfloat16 products that read the weight once, at memory's speed.

oneDNN reaches two thirds of the memory's bandwidth with the few rows that a decode step has per expert, and its bits
depend on how many there are. These do neither (docs/log.md has the figures, `grokmoe.native.dots` the layout).

Letters: N rows, I inputs, O outputs, P panels of 32 outputs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from grokmoe.native import MOST_ROWS, PANEL, UNROLL, array, dot_panel, entry, has_dots, inner, loop, put, take

ROW_BYTES = 480 * 1024
"""Rows that a core keeps beside it while all panels pass: about half of its second cache."""

PANEL_NS_PER_BYTE = 0.04
"""A core reads some 25 bytes of a weight per nanosecond; what decides whether a second thread is worth its call."""


def can_use_panels(dtype: torch.dtype, in_features: int) -> bool:
    """Whether this CPU multiplies in this type by panels, and rows have a length that it takes."""
    return dtype is torch.bfloat16 and in_features % (2 * UNROLL) == 0 and has_dots()


def to_panels(weight_OI: torch.Tensor) -> torch.Tensor:
    """[P, I / 2, 32, 2], new; outputs that fill up the last panel are zero."""
    num_out, num_in = weight_OI.shape
    num_panels = -(-num_out // PANEL)
    if num_out % PANEL:
        weight_OI = torch.nn.functional.pad(weight_OI, (0, 0, 0, num_panels * PANEL - num_out))
    pairs_PnI = weight_OI.contiguous().view(torch.int32).view(num_panels, PANEL, num_in // 2)
    return pairs_PnI.transpose(1, 2).contiguous().view(torch.bfloat16).view(num_panels, num_in // 2, PANEL, 2)


def grain(num_rows: int, num_in: int, panels_per_unit: int = 1) -> int:
    """Units that take about ten microseconds: panels that so many rows pass through."""
    num_bytes = panels_per_unit * PANEL * num_in * 2 * max(1.0, num_rows / 16)
    return max(1, round(10_000 / (num_bytes * PANEL_NS_PER_BYTE)))


WORDS_PER_10_US = 20_000
"""Pairs of inputs that one thread puts in their place in ten microseconds."""


@inner
def num_blocks(num_rows: int) -> int:
    """Blocks that so many rows are shared out among, evenly."""
    return (num_rows + MOST_ROWS - 1) // MOST_ROWS


@inner
def rows_per_group(num_in: int) -> int:
    """Rows that pass through all panels before the next ones do."""
    return max(1, ROW_BYTES // (2 * num_in) // MOST_ROWS) * MOST_ROWS


@inner
def pack_block(x_NW: Any, first: int, num: int, packed_W: Any) -> None:
    """Rows `first` and the following as a block. x_NW: two inputs a word; packed_W: the block's words."""
    for row in range(num):
        for word in range(x_NW.shape[1]):
            packed_W[word * num + row] = x_NW[first + row, word]


@loop(grain=1)
def _pack(element: Any) -> Any:
    """x_NI -> its blocks, section by section: a unit is a block."""

    @entry
    def run(params: Any) -> None:
        N, W, S = params[2], params[3], params[4]
        counts_S = array(np.int64, params[5], (S,))
        size = 0
        for section in range(S):
            size += num_blocks(counts_S[section])
        x_NW, packed = array(np.uint32, params[6], (N, W)), array(np.uint32, params[7], (N * W,))
        section, past, row = 0, 0, 0
        unit = take(params, 1)
        while unit < size:
            while unit >= past + num_blocks(counts_S[section]):
                past += num_blocks(counts_S[section])
                row += counts_S[section]
                section += 1
            count, blocks = counts_S[section], num_blocks(counts_S[section])
            first, last = row + count * (unit - past) // blocks, row + count * (unit - past + 1) // blocks
            pack_block(x_NW, first, last - first, packed[first * W : last * W])
            unit = take(params, 1)

    return run


@loop(grain=1)
def _product(element: Any) -> Any:
    """Blocks of x_NI, panels -> y_NO, whose type is `element`."""

    @entry
    def run(params: Any) -> None:
        size, N, num_in, num_out = params[0], params[2], params[3], params[4]
        x, weight = params[5], params[6]
        y_NO = array(element, params[7], (N, num_out))
        sums = np.empty((MOST_ROWS, PANEL), np.float32)
        P, blocks = (num_out + PANEL - 1) // PANEL, num_blocks(N)
        at_once = rows_per_group(num_in) // MOST_ROWS
        unit = take(params, 1)
        while unit < size:
            panel = unit % P
            width, weights = min(PANEL, num_out - panel * PANEL), weight + panel * PANEL * 2 * num_in
            for block in range(unit // P * at_once, min(unit // P * at_once + at_once, blocks)):
                first = N * block // blocks
                num = N * (block + 1) // blocks - first
                dot_panel(num, x + first * 2 * num_in, weights, num_in // 2, sums.ctypes.data)
                for row in range(num):
                    for out in range(width):
                        put(y_NO, first + row, panel * PANEL + out, sums[row, out])
            unit = take(params, 1)

    return run


def num_groups(num_rows: int, num_in: int) -> int:
    """Groups of so many rows, see `rows_per_group`."""
    at_once: int = rows_per_group.py_func(num_in) // MOST_ROWS
    blocks: int = num_blocks.py_func(num_rows)
    return math.ceil(blocks / at_once)


def pack_blocks(x_NI: torch.Tensor, counts_S: torch.Tensor) -> torch.Tensor:
    """The same rows in blocks, new; no block holds rows of two sections.

    counts_S: int64, rows of each section, zero allowed; read when the loop runs. Returns: as many elements, in the
    kernel's order.
    """
    num_rows, num_in = x_NI.shape
    if num_rows == 1:
        return x_NI.contiguous()
    blocks = torch.empty_like(x_NI, memory_format=torch.contiguous_format)
    _pack(
        x_NI.dtype, math.ceil(num_rows / MOST_ROWS), 0, num_rows, num_in // 2, len(counts_S), counts_S,
        x_NI.contiguous(), blocks, grain=max(1, WORDS_PER_10_US // (num_in // 2 * MOST_ROWS)),
    )  # fmt: skip
    return blocks


class PanelLinear:
    """y = x W^T in bfloat16, on a CPU that can. Keeps no reference to the weight it was made from.

    A row's result does not depend on the rows beside it, nor on the number of threads.
    """

    __slots__ = ("dtype", "in_features", "out_dtype", "out_features", "panels")

    is_loops = True

    def __init__(self, weight_OI: torch.Tensor, out_dtype: torch.dtype | None = None) -> None:
        """weight_OI: as in the checkpoint; see `can_use_panels`. out_dtype: of y, float32; None: the weight's."""
        self.out_features, self.in_features = weight_OI.shape
        self.dtype, self.out_dtype = weight_OI.dtype, out_dtype or weight_OI.dtype
        assert can_use_panels(self.dtype, self.in_features)
        self.panels = to_panels(weight_OI)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        device: torch.device = self.panels.device
        return device

    @property
    def row_counts(self) -> tuple[int, ...]:
        """It computes with any."""
        return ()

    @torch.inference_mode()
    def __call__(self, x_NI: torch.Tensor) -> torch.Tensor:
        """x_NI -> y_NO, new."""
        num_rows = len(x_NI)
        y_NO = x_NI.new_empty(num_rows, self.out_features, dtype=self.out_dtype)
        if num_rows:
            blocks, num_in = pack_blocks(x_NI, torch.tensor((num_rows,))), self.in_features
            _product(
                self.out_dtype, num_groups(num_rows, num_in) * len(self.panels), 0, num_rows, num_in, self.out_features,
                blocks, self.panels, y_NO, grain=grain(num_rows, num_in),
            )  # fmt: skip
        return y_NO
