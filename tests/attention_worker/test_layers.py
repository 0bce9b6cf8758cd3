"""Norm and rotary embedding against their equations in float64."""

from __future__ import annotations

import pytest
import torch

from attention_worker.layers import Rope, rms_norm


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_norm(dtype: torch.dtype, tolerance: float) -> None:
    x = (torch.randn(5, 192) * torch.tensor([1e-4, 1e-2, 1.0, 30.0, 1e4])[:, None]).to(dtype)
    gain = torch.rand(192) + 0.5
    wide = x.double()
    expected = gain.double() * wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    out = rms_norm(x, gain, 1e-5)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance * 1e-2)


def test_norm_with_a_gain_of_another_dtype_and_no_rows() -> None:
    gain = torch.rand(64).bfloat16()
    x = torch.randn(3, 64)
    assert torch.equal(rms_norm(x, gain, 1e-5), rms_norm(x, gain.float(), 1e-5))
    assert rms_norm(x[:0], gain, 1e-5).shape == (0, 64)


def rotated(x_THd: torch.Tensor, positions: list[int], base: float) -> torch.Tensor:
    """Pairs (i, i + d/2) as complex numbers, turned by position * base^(-2i/d), in float64."""
    d = x_THd.shape[-1]
    first, second = x_THd.double().chunk(2, dim=-1)
    frequency = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.tensor(positions, dtype=torch.float64)[:, None, None] * frequency
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_rope(head_dim: int, dtype: torch.dtype, tolerance: float) -> None:
    positions = [0, 1, 2, 77, 500]
    x_THd = torch.randn(5, 3, head_dim).to(dtype)
    rope = Rope(head_dim, 501, 10000.0)
    out = rope.rotate(x_THd, rope.angles(torch.tensor(positions)))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), rotated(x_THd, positions, 10000.0), rtol=0, atol=tolerance)
    assert torch.equal(out[0], x_THd[0])


def test_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 64)
    rope = Rope(64, 1200, 10000.0)

    def score(q_position: int, k_position: int) -> torch.Tensor:
        at_q, at_k = rope.angles(torch.tensor([q_position])), rope.angles(torch.tensor([k_position]))
        return (rope.rotate(q, at_q) * rope.rotate(k, at_k)).sum()

    torch.testing.assert_close(score(7, 3), score(1007, 1003), rtol=0, atol=1e-3)


def test_one_rotation_serves_any_number_of_heads() -> None:
    rope = Rope(32, 10, 10000.0)
    rotation = rope.angles(torch.tensor([3, 9, 0]))
    x_THd = torch.randn(3, 6, 64)[..., ::2]
    out = rope.rotate(x_THd, rotation)
    assert out.is_contiguous()
    assert torch.equal(out[:, 2:4], rope.rotate(x_THd[:, 2:4], rotation))


def test_positions_outside_the_table_and_odd_heads_are_refused() -> None:
    with pytest.raises(IndexError):
        Rope(32, 10, 10000.0).angles(torch.tensor([10]))
    with pytest.raises(ValueError, match="even"):
        Rope(33, 10, 10000.0)
