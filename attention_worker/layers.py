"""The small layers around attention: root-mean-square norm and rotary position embedding.

Shapes: T tokens, H heads, d head size, D any last dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attention_worker.row_passes import rows_of


def rms_norm(x: torch.Tensor, gain_D: torch.Tensor, eps: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """gain * x / sqrt(mean(x^2) + eps) over the last dimension, in float32; x's shape, in `dtype` or x's own."""
    return torch.nn.functional.rms_norm(x.float(), gain_D.shape, gain_D.float(), eps).to(dtype or x.dtype)


@dataclass(frozen=True)
class Rotation:
    """Cosines and signed sines of one step's positions, [T, 1, d] each: looked up once and used by every layer."""

    cos: torch.Tensor
    sin: torch.Tensor


class Rope:
    """Rotary position embedding on all d elements, "neox" pairing: element i turns with i + d / 2.

    The angle of pair i at position p is p * base^(-2i / d), in float32.
    """

    def __init__(self, head_dim: int, max_positions: int, base: float, device: torch.device | str = "cpu") -> None:
        """Tabulates positions 0 to max_positions - 1. ValueError if `head_dim` is odd."""
        if head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head size, not {head_dim}")
        frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angle = torch.arange(max_positions, dtype=torch.float32)[:, None, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        self._cos_Pd = torch.cat((cos, cos), dim=-1)[:, 0].to(device)
        self._sin_Pd = torch.cat((-sin, sin), dim=-1)[:, 0].to(device)

    def angles(self, positions_T: torch.Tensor) -> Rotation:
        """The rotations of these positions. IndexError (on a CPU) if one is not in the table."""
        return Rotation(
            rows_of(self._cos_Pd, positions_T).unsqueeze(1), rows_of(self._sin_Pd, positions_T).unsqueeze(1)
        )

    @staticmethod
    def rotate(x_THd: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """Every head of `x` turned by its token's position; float32 inside, x's dtype out, contiguous."""
        x_wide = x_THd.float()
        half = x_wide.shape[-1] // 2
        swapped = torch.cat((x_wide[..., half:], x_wide[..., :half]), dim=-1)
        return torch.addcmul(x_wide * rotation.cos, swapped, rotation.sin).to(x_THd.dtype)
