"""Matrices in float8_e4m3fn with their scales, as programs that quantise write them: `x.weight` and `x.weight_scale`.

A scale is one number for the matrix, or one for each output. `x.input_scale`, with which some programs quantise rows,
is passed over: rows here have scales of their own.

Letters: O outputs, I inputs, R rows that are asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from grokmoe.layouts.mapped_file import tensor_error
from grokmoe.layouts.source import TORCH_DTYPES, Source, StoredRows

F8_E4M3 = "F8_E4M3"
"""Its name in safetensors."""

SCALE, INPUT_SCALE = "_scale", ".input_scale"


@dataclasses.dataclass(frozen=True)
class ScaledRows(Source):
    """A matrix [O, I] and its scales. As rows of a float type they are dequantised."""

    stored: StoredRows
    scale: StoredRows

    @property
    def values(self) -> torch.dtype:
        """See Source: float32 has every product of the two."""
        return torch.float32

    def rows(self, first: int, stop: int, columns: slice | None = None) -> torch.Tensor:
        """See Source."""
        q_RI, scale_R = self.rows_in_8_bits(first, stop, columns)
        return q_RI.float() * scale_R[:, None]

    def rows_in_8_bits(self, first: int, stop: int, columns: slice | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As they are stored: float8_e4m3fn, and the scale of each row, float32."""
        scale_R = self.scale.whole().float().flatten()
        if len(scale_R) == 1:
            scale_R = scale_R.expand(self.shape[0])
        return self.stored.rows(first, stop, columns), scale_R[first:stop].contiguous()


def with_scales(found: Mapping[str, StoredRows]) -> dict[str, Source]:
    """The tensors of a checkpoint, those in eight bits put together with their scales.

    found: by canonical name; scales have the names that they are stored under. Raises CheckpointError for a matrix in
    eight bits whose scale is missing or of another form.
    """
    by_stored_name = {tensor.stored_name: tensor for tensor in found.values()}
    joined: dict[str, Source] = dict(found)
    for name, tensor in found.items():
        if tensor.dtype != F8_E4M3:
            continue
        scale_name = tensor.stored_name + SCALE
        scale = by_stored_name.get(scale_name)
        num_outputs = tensor.shape[0] if tensor.shape else 0
        expected = f"one float, or one for each of {num_outputs} outputs"
        if scale is None:
            raise tensor_error(scale_name, tensor.path, expected, f"none, and {tensor.stored_name} is {F8_E4M3}")
        is_of_outputs = math.prod(scale.shape[:1]) == num_outputs and math.prod(scale.shape[1:]) == 1
        if scale.dtype not in TORCH_DTYPES or not (math.prod(scale.shape) == 1 or is_of_outputs):
            raise tensor_error(scale_name, scale.path, expected, f"{scale.dtype} {list(scale.shape)}")
        num_bytes = tensor.num_bytes + scale.num_bytes
        joined[name] = ScaledRows(tensor.stored_name, tensor.path, F8_E4M3, tensor.shape, num_bytes, tensor, scale)
        joined.pop(scale_name)
        joined.pop(tensor.stored_name.removesuffix(".weight") + INPUT_SCALE, None)
    return joined
