"""y = x W^T with the weight laid out once for the device: the one place that chooses how.

Letters: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Protocol

import torch

from grokmoe.packed_linear import PackedLinear
from grokmoe.part_linear import PartLinear


class Linear(Protocol):
    """One weight, ready for its device."""

    @property
    def device(self) -> torch.device:
        """Where the weight is, and what it is multiplied with must be."""

    @property
    def row_counts(self) -> tuple[int, ...]:
        """The row counts it computes with, ascending; empty: all of them."""

    @property
    def is_loops(self) -> bool:
        """Whether it computes by compiled loops alone, which can be recorded (`grokmoe.recording`)."""

    def __call__(self, x_NI: torch.Tensor) -> torch.Tensor:
        """x_NI -> y_NO, new."""


def new_linear(weight_OI: torch.Tensor, deterministic: bool = False, is_part: bool = False) -> Linear:
    """The fastest that this device has. Keeps no reference to the weight.

    deterministic: a row's bits must not depend on the rows beside it. See PackedLinear on which thread may call then.
    is_part: y is float32, see `part_linear`.
    """
    if weight_OI.device.type == "cpu" and weight_OI.dtype is torch.bfloat16:
        from grokmoe.panels import PanelLinear, can_use_panels  # numba is not loaded where it is not used

        if can_use_panels(weight_OI.dtype, weight_OI.shape[1]):
            return PanelLinear(weight_OI, torch.float32 if is_part else None)
    return (PartLinear if is_part else PackedLinear)(weight_OI, deterministic)
