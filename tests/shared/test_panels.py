"""Products by panels, against float32's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grokmoe.linear import new_linear
from grokmoe.native import has_dots
from grokmoe.packed_linear import PackedLinear
from grokmoe.panels import PanelLinear, can_use_panels, num_groups, pack_blocks, to_panels

HALVES = slice(0, 32), slice(32, 64)

needs_dots = pytest.mark.skipif(not has_dots(), reason="this CPU has no dot products of bfloat16")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def weight(num_out: int, num_in: int) -> torch.Tensor:
    return (draw(num_out, num_in, seed=1).float() / num_in**0.5).bfloat16()


def test_a_panel_has_two_inputs_of_32_outputs_side_by_side() -> None:
    weight_OI = weight(70, 24)
    panels = to_panels(weight_OI)
    assert panels.shape == (3, 12, 32, 2)
    for out, num_in in ((0, 0), (31, 23), (32, 1), (69, 6)):
        assert panels[out // 32, num_in // 2, out % 32, num_in % 2] == weight_OI[out, num_in]
    assert not panels[2, :, 6:].any()


def test_a_block_has_two_inputs_of_its_rows_side_by_side() -> None:
    rows_NI = draw(30, 16)
    blocks = pack_blocks(rows_NI, torch.tensor((2, 0, 25, 3))).view(-1)
    at = 0
    for first, last in ((0, 2), (2, 10), (10, 18), (18, 27), (27, 30)):  # 25 rows are three blocks
        num = last - first
        block = blocks[at : at + num * 16].view(8, num, 2)
        assert torch.equal(block.transpose(0, 1).reshape(num, 16), rows_NI[first:last])
        at += num * 16


@needs_dots
@settings(max_examples=60, deadline=None)
@given(num_rows=st.integers(1, 70), num_in=st.integers(1, 40).map(lambda n: 8 * n), num_out=st.integers(1, 100))
def test_it_is_the_product(num_rows: int, num_in: int, num_out: int) -> None:
    weight_OI, x_NI = weight(num_out, num_in), draw(num_rows, num_in)
    y_NO = PanelLinear(weight_OI)(x_NI)
    assert y_NO.shape == (num_rows, num_out)
    torch.testing.assert_close(y_NO.float(), x_NI.float() @ weight_OI.float().T, rtol=8e-3, atol=1e-3)


@needs_dots
def test_a_part_of_a_sum_is_not_rounded() -> None:
    """Two halves of the inputs, added up in float32, are as near to the product as float32 is."""
    weight_OI, x_NI = weight(70, 64), draw(13, 64)
    halves = [PanelLinear(weight_OI[:, part].contiguous(), torch.float32)(x_NI[:, part]) for part in HALVES]
    assert [half.dtype for half in halves] == [torch.float32] * 2
    exact_NO = x_NI.double() @ weight_OI.double().T
    assert (halves[0] + halves[1] - exact_NO).abs().max() < 1e-5
    # Rounded before, they would not be.
    assert (halves[0].bfloat16() + halves[1].bfloat16() - exact_NO).abs().max() > 1e-3
    whole = PanelLinear(weight_OI)
    assert torch.equal(PanelLinear(weight_OI, torch.float32)(x_NI).bfloat16(), whole(x_NI))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_part_is_float32_on_every_path(dtype: torch.dtype, deterministic: bool) -> None:
    for num_in in (60, 64):  # by panels the second only
        weight_OI, x_NI = weight(24, num_in).to(dtype), draw(5, num_in).to(dtype)
        part = new_linear(weight_OI, deterministic, is_part=True)
        assert part(x_NI).dtype is torch.float32
        assert part(x_NI[:0]).dtype is torch.float32
        assert torch.equal(part(x_NI).to(dtype), new_linear(weight_OI, deterministic)(x_NI))


@needs_dots
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_s_bits_are_its_own(num_threads: int) -> None:
    """Also where rows are taken in several groups."""
    linear, x_NI = PanelLinear(weight(40, 20480)), draw(50, 20480)
    assert num_groups(50, 20480) > 1
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        y_NO = linear(x_NI)
        for num_rows in range(1, 50):
            begin = 50 - num_rows
            assert torch.equal(linear(x_NI[begin:]), y_NO[begin:]), num_rows
    finally:
        torch.set_num_threads(threads)


@needs_dots
def test_rows_of_any_kind() -> None:
    linear = PanelLinear(weight(33, 16))
    assert linear(draw(0, 16)).shape == (0, 33)
    wide = draw(6, 32)
    assert torch.equal(linear(wide[:, :16]), linear(wide[:, :16].contiguous()))
    assert torch.equal(linear(wide[::2, :16]), linear(wide[:, :16])[::2])
    data = bytearray(1) + wide[:3, :16].contiguous().view(torch.uint8).numpy().tobytes()
    shifted = torch.frombuffer(data, dtype=torch.bfloat16, offset=1).view(3, 16)
    assert torch.equal(linear(shifted), linear(wide[:3, :16]))


@needs_dots
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_in_its_row(bad: float) -> None:
    linear, x_NI = PanelLinear(weight(40, 64)), draw(20, 64)
    good_NO = linear(x_NI)
    x_NI[7, 63] = bad
    y_NO = linear(x_NI)
    assert not y_NO[7].isfinite().any()
    others = [row for row in range(20) if row != 7]
    assert torch.equal(y_NO[others], good_NO[others])


def test_where_panels_do_not_fit_another_product_is_taken() -> None:
    assert not can_use_panels(torch.float32, 64)
    assert not can_use_panels(torch.bfloat16, 60)
    assert isinstance(new_linear(torch.randn(32, 64)), PackedLinear)
    assert isinstance(new_linear(weight(32, 60)), PackedLinear)
    assert isinstance(new_linear(weight(32, 64)), PanelLinear) == has_dots()
