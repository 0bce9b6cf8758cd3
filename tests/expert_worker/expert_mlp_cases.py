"""Inputs, canaries and tolerances shared by the tests of the expert MLP, on the CPU and on a GPU.

Shapes: N rows, E experts held, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grokmoe.model_config import Gelu

DTYPES = (torch.float32, torch.bfloat16)

# Tile heights are 16, 64 and 128.
ROUTINGS = {
    "one row": [0, 1, 0],
    "empty experts": [0, 5, 0, 0, 7, 0],
    "all rows on one expert": [0, 37, 0, 0],
    "whole tiles": [16, 16],
    "one past a tile": [17, 1, 64],
    "tall and short": [130, 0, 1],
    "no rows": [0, 0],
}

# Largest error relative to the largest value, and RMS error relative to the RMS. In bfloat16 kernel and
# twin round at the same places, so they differ where a rounding falls the other way: one step is 2^-8,
# hence the first number. A rounding too many or too few changes all values, and shows in the second.
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (8e-3, 5e-4)}


@dataclass(frozen=True)
class Case:
    """Arguments of one call."""

    rows: torch.Tensor  # [N, D]
    counts: Sequence[int]  # [E]
    gate: torch.Tensor  # [E, F, D]
    up: torch.Tensor  # [E, F, D]
    down: torch.Tensor  # [E, D, F]
    gelu: Gelu

    @classmethod
    def random(
        cls, counts_E: Sequence[int], D: int, F: int, dtype: torch.dtype, gelu: Gelu, device: str = "cpu"
    ) -> Case:
        """Activations of order 1. Experts without rows have weights of NaN: they must not matter."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        E = len(counts_E)
        weights = [draw(E, F, D) / D**0.5, draw(E, F, D) / D**0.5, draw(E, D, F) / F**0.5]
        for weight in weights:
            weight[[count == 0 for count in counts_E]] = torch.nan
        gate, up, down = (weight.to(device, dtype) for weight in weights)
        return cls(draw(sum(counts_E), D).to(device, dtype), counts_E, gate, up, down, gelu)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.rows, self.gate, self.up, self.down

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What `expert_mlp` takes."""
        return self.rows, self.counts, self.gate, self.up, self.down, self.gelu

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype


@dataclass(frozen=True)
class Sea:
    """A tensor (the island) inside a larger one that is NaN everywhere else: canaries on all sides."""

    water: torch.Tensor
    island: torch.Tensor

    @classmethod
    def around(cls, tensor: torch.Tensor, width: int = 3) -> Sea:
        """A copy of the tensor, with `width` NaN elements, rows, ... before and after it on every axis."""
        water = tensor.new_full([size + 2 * width for size in tensor.shape], torch.nan)
        island = water[tuple(slice(width, width + size) for size in tensor.shape)]
        island.copy_(tensor)
        return cls(water, island)

    def is_calm(self) -> bool:
        """Whether all around the island still is NaN."""
        water = self.water.isnan()
        return int(water.sum() - self.island.isnan().sum()) == self.water.numel() - self.island.numel()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within TOLERANCE for the dtype, shapes and dtypes equal, everything finite."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    if not expected.numel():
        return
    assert expected.isfinite().all(), f"{(~expected.isfinite()).sum()} expected values are not finite"
    assert actual.isfinite().all(), f"{(~actual.isfinite()).sum()} of {actual.numel()} values are not finite"
    error, scale = (actual.double() - expected.double()).abs(), expected.double().abs()
    largest = (error.max() / scale.max()).item()
    rms = (error.square().mean() / scale.square().mean()).sqrt().item()
    worst = divmod(int(error.argmax()), actual.shape[-1])
    message = f"error {largest:.2e} of the largest value (row, column {worst}), {rms:.2e} RMS"
    limit_largest, limit_rms = TOLERANCE[actual.dtype]
    assert largest <= limit_largest and rms <= limit_rms, message  # noqa: PT018
