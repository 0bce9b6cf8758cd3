"""Weights as int8: quantised by output, and laid out in the order in which the loops read them. Pure.

    weight[o, i] ~ scale[o] * q[o, i],    q from -127 to 127

Symmetric, one scale for each output, so a product with a row of integers is a sum of integers times two scales.

A matrix is cut into panels (`grokmoe.native.int8_dots`). Gate and up share theirs, 32 outputs of the one beside the
same 32 of the other, so that one pass over a row gives both factors of the GELU's product. What is missing at the end
of the last panel is filled up: with outputs of scale zero, and inputs whose rows have a zero there.

Letters: O outputs, I inputs, P panels, S steps of STEP_INPUTS inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from expert_worker.expert_dtype import MAX_INT8_INPUTS
from grokmoe.native.int8_dots import PANEL_OUTPUTS, STEP_INPUTS, WEIGHT_OFFSET

LARGEST = 127
"""Of a quantised number, in either direction: -128 has no counterpart."""

SMALLEST_SCALE = 2.0**-100
"""Scale of zeros, and of what is so small that it may count as zeros: its inverse must be a number."""

SLICE_OUTPUTS = 256
"""Outputs that are quantised at a time: of each there is a float32 copy meanwhile."""


class QuantisedRows(NamedTuple):
    """q: int8, as the rows. scale: float32, one for each row; NaN where the row has a number that is not finite."""

    q: torch.Tensor
    scale: torch.Tensor


def quantise_rows(x_NI: torch.Tensor) -> QuantisedRows:
    """Each row by its own largest value, rounded to even. The twin of what the loops do with rows of inputs."""
    x_NI = x_NI.float()
    scale_N = (x_NI.abs().amax(1) * (1 / LARGEST)).clamp_min(SMALLEST_SCALE)
    scale_N = torch.where(scale_N.isfinite(), scale_N, torch.nan)
    q_NI = (x_NI * (1 / scale_N)[:, None]).round_().nan_to_num_(0.0, 0.0, 0.0)
    return QuantisedRows(q_NI.to(torch.int8), scale_N)


def num_of(size: int, total: int) -> int:
    """Parts of a size that hold the total, the last one perhaps not full."""
    return -(-total // size)


class Panels:
    """One matrix, or several side by side, as panels and scales.

    bytes_PSOI: uint8 [panels, steps, PANEL_OUTPUTS, STEP_INPUTS]. scales_PO: float32 [panels, PANEL_OUTPUTS].
    addresses: of both, for the loops.
    """

    __slots__ = ("_outputs_each", "addresses", "bytes_PSOI", "num_panels", "num_steps", "scales_PO")

    def __init__(self, out_features: int, in_features: int, num_matrices: int = 1) -> None:
        """num_matrices: that share each panel, all of this shape."""
        assert PANEL_OUTPUTS % num_matrices == 0
        assert in_features <= MAX_INT8_INPUTS, in_features
        self._outputs_each = PANEL_OUTPUTS // num_matrices
        self.num_panels = num_of(self._outputs_each, out_features)
        self.num_steps = num_of(STEP_INPUTS, in_features)
        self.bytes_PSOI = torch.empty(self.num_panels, self.num_steps, PANEL_OUTPUTS, STEP_INPUTS, dtype=torch.uint8)
        self.scales_PO = torch.empty(self.num_panels, PANEL_OUTPUTS)
        self.addresses = self.bytes_PSOI.data_ptr(), self.scales_PO.data_ptr()

    def put(self, weight_OI: torch.Tensor, matrix: int = 0) -> None:
        """Quantises one matrix into its place. Keeps no reference."""
        each = self._outputs_each
        place = slice(matrix * each, (matrix + 1) * each)
        num_at_once = max(1, SLICE_OUTPUTS // each)
        for begin in range(0, self.num_panels, num_at_once):
            panels = slice(begin, min(begin + num_at_once, self.num_panels))
            num_outputs = (panels.stop - begin) * each
            part_OI = weight_OI[begin * each : panels.stop * each]
            q_OI, scale_O = quantise_rows(part_OI)
            bytes_OI = torch.full((num_outputs, self.num_steps * STEP_INPUTS), WEIGHT_OFFSET, dtype=torch.uint8)
            bytes_OI[: len(q_OI), : q_OI.shape[1]] = q_OI.view(torch.uint8) ^ WEIGHT_OFFSET  # which adds it
            fours_OS = bytes_OI.view(torch.int32).view(-1, each, self.num_steps)
            self.bytes_PSOI[panels].view(torch.int32)[:, :, place, 0] = fours_OS.transpose(1, 2)
            scales = torch.zeros(num_outputs)
            scales[: len(scale_O)] = scale_O
            self.scales_PO[panels, place] = scales.view(-1, each)


def panel_bytes(out_features: int, in_features: int, num_matrices: int = 1) -> int:
    """Memory that `Panels` of this shape take."""
    num_panels, num_steps = num_of(PANEL_OUTPUTS // num_matrices, out_features), num_of(STEP_INPUTS, in_features)
    return num_panels * PANEL_OUTPUTS * (num_steps * STEP_INPUTS + torch.float32.itemsize)
