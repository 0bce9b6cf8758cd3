"""The loops of an expert MLP in int8: rows to integers, gate and up to the GELU's product, and down.

    q, s = quantised(x)                      one scale for each row
    h = gelu(s s_W (q Q_W)) * (s s_V (q Q_V))    sums in 32-bit integers, the rest in float32
    y = s' s_2 (q' Q_2)                      with q', s' = quantised(h)

A row that has a number which is not finite gets the scale NaN, and so has no finite output.

Threads share the panels; a row's numbers depend on the row alone, whatever is beside it and however many threads there
are. Shapes: N rows, E experts that have rows, D hidden, F ffn, P panels, I inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from grokmoe.native import array, as_f32, as_i32, entry, inner, loop, put, share, take, wide
from grokmoe.native.gelu import gelu_erf, gelu_tanh
from grokmoe.native.int8_dots import MOST_ROWS, PANEL_OUTPUTS, STEP_INPUTS, WEIGHT_OFFSET, dot_int8

HALF = PANEL_OUTPUTS // 2

BLOCK_STEPS = 1024
"""Steps of a panel that all rows go through before the next: 256 KiB, which a core's second cache holds."""

GRAIN_QUANTISE = 8
"""Rows that a thread quantises in about ten microseconds."""

_ONE_STEP = np.float32(1.0 / 127.0)
_SMALLEST_SCALE = np.float32(2.0**-100)
_INFINITE = np.int32(0x7F800000)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_NAN = np.uint32(0x7FC00000)


@loop(grain=GRAIN_QUANTISE)
def quantise(element: Any) -> Any:
    """(N; columns, stride of q, rows [N, columns], q, scales, offsets): each row by its own largest value.

    offsets: what the sums of a row start from, see WEIGHT_OFFSET.
    """

    @entry
    def run(params: Any) -> None:
        N, num_inputs, stride = params[0], params[1], params[2]
        x_NI, q_NI = array(element, params[3], (N, num_inputs)), array(np.int8, params[4], (N, stride))
        scale_N, offset_N = array(np.float32, params[5], (N,)), array(np.int32, params[6], (N,))
        first, end = share(N)
        for n in range(first, end):
            largest = np.int32(0)
            for i in range(num_inputs):
                largest = max(largest, as_i32(wide(x_NI[n, i])) & _MAGNITUDE)  # NaN is above infinity
            for i in range(num_inputs, stride):
                q_NI[n, i] = np.int8(0)
            total = np.int32(0)
            if largest >= _INFINITE:
                scale_N[n] = as_f32(_NAN)
                for i in range(num_inputs):
                    q_NI[n, i] = np.int8(0)
            else:
                scale = max(as_f32(np.uint32(largest)) * _ONE_STEP, _SMALLEST_SCALE)
                inverse = np.float32(1.0) / scale
                scale_N[n] = scale
                for i in range(num_inputs):
                    q = np.int32(np.rint(wide(x_NI[n, i]) * inverse))
                    q_NI[n, i] = np.int8(q)
                    total += q
            offset_N[n] = np.int32(-WEIGHT_OFFSET) * total

    return run


@inner
def _sums(panel: int, num_steps: int, q: int, stride: int, offset_N: Any, first: int, end: int, sums_NO: Any) -> None:
    """Integer products of some rows with one panel. Few rows at a time, of equal numbers."""
    num_rows = end - first
    num_passes = (num_rows + MOST_ROWS - 1) // MOST_ROWS
    for n in range(num_rows):
        for o in range(PANEL_OUTPUTS):
            sums_NO[n, o] = offset_N[first + n]
    for step in range(0, num_steps, BLOCK_STEPS):
        num = min(BLOCK_STEPS, num_steps - step)
        weights = panel + step * STEP_INPUTS * PANEL_OUTPUTS
        for each in range(num_passes):
            begin, stop = each * num_rows // num_passes, (each + 1) * num_rows // num_passes
            rows = q + (first + begin) * stride + step * STEP_INPUTS
            dot_int8(stop - begin, rows, stride, weights, num, sums_NO.ctypes.data + begin * PANEL_OUTPUTS * 4)


@inner
def _num_units(counts_E: Any, P: int, begin: int, end: int) -> Any:
    """Panels of all experts that have any of the rows from `begin` to `end`."""
    row, total = 0, 0
    for count in counts_E:
        total += P if min(row + count, end) > max(row, begin) else 0
        row += count
    return total


@inner
def _find(unit: int, expert: int, past: int, row: int, counts_E: Any, P: int, begin: int, end: int) -> Any:
    """The expert that a unit of work belongs to, from the one before: (expert, units before its first, its first
    row)."""
    while True:
        count = counts_E[expert]
        if min(row + count, end) > max(row, begin):
            if unit < past + P:
                return expert, past, row
            past += P
        row += count
        expert += 1


@loop(grain=1)
def gate_up(element: Any) -> Any:
    """Rows to h, float32: a unit is a panel of an expert that has any of the rows.

    (units at most; 0, N, panels of an expert, steps, q, its scales, its offsets, h [N, F], F, is tanh, E, counts_E,
    table_E2, place of the first row). counts_E: rows of each expert, of which these N are some. table_E2: addresses of
    panels and scales.
    """

    @entry
    def run(params: Any) -> None:
        N, P, num_steps, q = params[2], params[3], params[4], params[5]
        scale_N, offset_N = array(np.float32, params[6], (N,)), array(np.int32, params[7], (N,))
        F, is_tanh, E, begin = params[9], params[10] != 0, params[11], params[14]
        counts_E, table_E2 = array(np.int64, params[12], (E,)), array(np.int64, params[13], (E, 2))
        h_NF, stride = array(np.float32, params[8], (N, F)), num_steps * STEP_INPUTS
        sums_NO, h = np.empty((N, PANEL_OUTPUTS), np.int32), np.empty(HALF, np.float32)
        size = _num_units(counts_E, P, begin, begin + N)
        expert, past, row = 0, 0, 0
        unit = take(params, 1)
        while unit < size:
            expert, past, row = _find(unit, expert, past, row, counts_E, P, begin, begin + N)
            p, scales_PO = unit - past, array(np.float32, table_E2[expert, 1], (P, PANEL_OUTPUTS))
            first, end = max(row - begin, 0), min(row + counts_E[expert] - begin, N)
            _sums(table_E2[expert, 0] + p * stride * PANEL_OUTPUTS, num_steps, q, stride, offset_N, first, end, sums_NO)
            for n in range(first, end):
                for o in range(HALF):
                    gate = np.float32(sums_NO[n - first, o]) * (scale_N[n] * scales_PO[p, o])
                    up = np.float32(sums_NO[n - first, HALF + o]) * (scale_N[n] * scales_PO[p, HALF + o])
                    h[o] = (gelu_tanh(gate) if is_tanh else gelu_erf(gate)) * up
                for o in range(min(HALF, F - p * HALF)):
                    h_NF[n, p * HALF + o] = h[o]
            unit = take(params, 1)

    return run


@loop(grain=1)
def down(element: Any) -> Any:
    """h to y: a unit is a panel of an expert that has any of the rows.

    (units at most; 0, N, panels of an expert, steps, q, its scales, its offsets, y [N, D], D, E, counts_E, table_E2,
    place of the first row), as for `gate_up`.
    """

    @entry
    def run(params: Any) -> None:
        N, P, num_steps, q = params[2], params[3], params[4], params[5]
        scale_N, offset_N = array(np.float32, params[6], (N,)), array(np.int32, params[7], (N,))
        D, E, begin = params[9], params[10], params[13]
        counts_E, table_E2 = array(np.int64, params[11], (E,)), array(np.int64, params[12], (E, 2))
        y_ND, stride = array(element, params[8], (N, D)), num_steps * STEP_INPUTS
        sums_NO = np.empty((N, PANEL_OUTPUTS), np.int32)
        size = _num_units(counts_E, P, begin, begin + N)
        expert, past, row = 0, 0, 0
        unit = take(params, 1)
        while unit < size:
            expert, past, row = _find(unit, expert, past, row, counts_E, P, begin, begin + N)
            p, scales_PO = unit - past, array(np.float32, table_E2[expert, 1], (P, PANEL_OUTPUTS))
            first, end = max(row - begin, 0), min(row + counts_E[expert] - begin, N)
            _sums(table_E2[expert, 0] + p * stride * PANEL_OUTPUTS, num_steps, q, stride, offset_N, first, end, sums_NO)
            for n in range(first, end):
                for o in range(min(PANEL_OUTPUTS, D - p * PANEL_OUTPUTS)):
                    y = np.float32(sums_NO[n - first, o]) * (scale_N[n] * scales_PO[p, o])
                    put(y_ND, n, p * PANEL_OUTPUTS + o, y)
            unit = take(params, 1)

    return run
