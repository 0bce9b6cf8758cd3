"""Expert MLPs on a CPU that multiplies bfloat16 by panels: all experts of a layer in two passes over their weights.

    h = gelu(x W^T) * (x V^T)    gate and up of the same panel one after the other, in float32 until h is rounded
    y = h W2^T

A thread takes the next panel of whichever expert is in turn, so threads are busy until all is done, however the rows
are spread, and each weight is read once by one of them. A row's result depends on nothing but the row and its expert.

Letters: N rows, E experts, D hidden, F ffn, P panels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from grokmoe.model_config import Gelu, ModelConfig
from grokmoe.native import MOST_ROWS, PANEL, array, dot_panel, entry, inner, loop, put, take
from grokmoe.native.gelu import gelu_erf, gelu_tanh
from grokmoe.panels import can_use_panels, grain, num_blocks, num_groups, pack_blocks, rows_per_group


@inner
def _find(unit: int, expert: int, past: int, row: int, counts_E: Any, per_expert: int, at_once: int) -> Any:
    """The expert that a unit of work belongs to, from the one before: (expert, units before its first, its first row).

    per_expert: units of a group of rows; at_once: blocks of a group.
    """
    while True:
        blocks = num_blocks(counts_E[expert])
        following = past + (blocks + at_once - 1) // at_once * per_expert
        if unit < following:
            return expert, past, row
        past = following
        row += counts_E[expert]
        expert += 1


@inner
def _num_units(counts_E: Any, per_expert: int, at_once: int) -> Any:
    """Units of work of all experts, see `_find`."""
    total = 0
    for count in counts_E:
        total += (num_blocks(count) + at_once - 1) // at_once * per_expert
    return total


@loop(grain=1)
def _gate_up(element: Any) -> Any:
    """Blocks of x_ND -> blocks of h_NF."""

    @entry
    def run(params: Any) -> None:
        N, E, D, F, is_tanh = params[2], params[3], params[4], params[5], params[6] != 0
        counts_E, weights_E3 = array(np.int64, params[7], (E,)), array(np.int64, params[8], (E, 3))
        x, h_W = params[9], array(np.uint16, params[10], (1, N * F))
        gate, up = np.empty((MOST_ROWS, PANEL), np.float32), np.empty((MOST_ROWS, PANEL), np.float32)
        P, at_once = F // PANEL, rows_per_group(D) // MOST_ROWS
        size = _num_units(counts_E, P, at_once)
        expert, past, row = 0, 0, 0
        unit = take(params, 1)
        while unit < size:
            expert, past, row = _find(unit, expert, past, row, counts_E, P, at_once)
            group, panel = (unit - past) // P * at_once, (unit - past) % P
            count, offset = counts_E[expert], panel * PANEL * 2 * D
            blocks = num_blocks(count)
            for block in range(group, min(group + at_once, blocks)):
                first = count * block // blocks
                num = count * (block + 1) // blocks - first
                rows = x + (row + first) * 2 * D
                dot_panel(num, rows, weights_E3[expert, 0] + offset, D // 2, gate.ctypes.data)
                dot_panel(num, rows, weights_E3[expert, 1] + offset, D // 2, up.ctypes.data)
                for n in range(num):
                    if is_tanh:
                        for out in range(PANEL):
                            up[n, out] *= gelu_tanh(gate[n, out])
                    else:
                        for out in range(PANEL):
                            up[n, out] *= gelu_erf(gate[n, out])
                    at = (row + first) * F + panel * PANEL * num + 2 * n
                    for out in range(0, PANEL, 2):
                        put(h_W, 0, at + out * num, up[n, out])
                        put(h_W, 0, at + out * num + 1, up[n, out + 1])
            unit = take(params, 1)

    return run


@loop(grain=1)
def _down(element: Any) -> Any:
    """Blocks of h_NF -> y_ND."""

    @entry
    def run(params: Any) -> None:
        N, E, D, F = params[2], params[3], params[4], params[5]
        counts_E, weights_E3 = array(np.int64, params[6], (E,)), array(np.int64, params[7], (E, 3))
        h, y_ND = params[8], array(np.uint16, params[9], (N, D))
        sums = np.empty((MOST_ROWS, PANEL), np.float32)
        P, at_once = (D + PANEL - 1) // PANEL, rows_per_group(F) // MOST_ROWS
        size = _num_units(counts_E, P, at_once)
        expert, past, row = 0, 0, 0
        unit = take(params, 1)
        while unit < size:
            expert, past, row = _find(unit, expert, past, row, counts_E, P, at_once)
            group, panel = (unit - past) // P * at_once, (unit - past) % P
            count, weight = counts_E[expert], weights_E3[expert, 2] + panel * PANEL * 2 * F
            blocks, width = num_blocks(count), min(PANEL, D - panel * PANEL)
            for block in range(group, min(group + at_once, blocks)):
                first = count * block // blocks
                num = count * (block + 1) // blocks - first
                dot_panel(num, h + (row + first) * 2 * F, weight, F // 2, sums.ctypes.data)
                for n in range(num):
                    for out in range(width):
                        put(y_ND, row + first + n, panel * PANEL + out, sums[n, out])
            unit = take(params, 1)

    return run


def can_compute(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether this CPU can, in this type, for experts of this size."""
    widths = config.hidden_size, config.intermediate_size
    return all(can_use_panels(dtype, width) for width in widths) and config.intermediate_size % PANEL == 0


def expert_mlp(
    rows_ND: torch.Tensor, counts_E: torch.Tensor, weights_E3: torch.Tensor, num_ffn: int, gelu: Gelu
) -> torch.Tensor:
    """Passes each row through the MLP of its expert: `reference.expert_mlp` on panels.

    rows_ND: bfloat16, sorted by expert. counts_E: int64, rows of each expert, zero allowed, in all as many as there are
    rows; read when the loops run, so they may be a loop's result. weights_E3: int64, the addresses of each expert's
    gate, up and down panels (`grokmoe.panels.to_panels`); those of experts without rows are not read.
    num_ffn: F, a multiple of PANEL. Returns: out_ND, new.
    """
    out_ND = torch.empty_like(rows_ND, memory_format=torch.contiguous_format)
    num_rows, num_hidden = rows_ND.shape
    if num_rows == 0:
        return out_ND
    num_experts = len(counts_E)
    usual = -(-num_rows // num_experts)
    x_ND = pack_blocks(rows_ND, counts_E)
    h_NF = rows_ND.new_empty(num_rows, num_ffn)
    # How many units there are is known to the loops; that all rows could be of one expert tells whether threads pay.
    _gate_up(
        rows_ND.dtype, num_groups(num_rows, num_hidden) * (num_ffn // PANEL), 0, num_rows, num_experts, num_hidden,
        num_ffn, int(gelu is Gelu.TANH), counts_E, weights_E3, x_ND, h_NF, grain=grain(usual, num_hidden, 2),
    )  # fmt: skip
    _down(
        rows_ND.dtype, num_groups(num_rows, num_ffn) * -(-num_hidden // PANEL), 0, num_rows, num_experts, num_hidden,
        num_ffn, counts_E, weights_E3, h_NF, out_ND, grain=grain(usual, num_ffn),
    )  # fmt: skip
    return out_ND
