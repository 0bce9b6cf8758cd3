"""The largest entries of rows, against a sort in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_worker.largest import largest
from attention_worker.row_passes import first_largest, row_sums, scaled

ENTRY = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf])


def expected(row: list[float], num: int) -> list[int]:
    return sorted(range(len(row)), key=lambda index: (-row[index], index))[:num]


@given(st.integers(1, 40).flatmap(lambda size: st.lists(st.lists(ENTRY, min_size=size, max_size=size), min_size=1)))
def test_any_entries(rows: list[list[float]]) -> None:
    x_RV = torch.tensor(rows)
    for num in {1, len(rows[0]) // 2 or 1, len(rows[0])}:
        values_RK, ids_RK = largest(x_RV, num)
        assert ids_RK.tolist() == [expected(row, num) for row in rows]
        assert torch.equal(values_RK, x_RV.gather(1, ids_RK))
    ids_R, values_R = first_largest(x_RV)
    assert ids_R.tolist() == [expected(row, 1)[0] for row in rows]
    assert torch.equal(values_R, x_RV.amax(-1))


@pytest.mark.parametrize("size", [512, 1024, 2048, 2049, 4096])
@pytest.mark.parametrize("num_values", [1, 2, 40, 10**6])
def test_blocks_with_equals(size: int, num_values: int) -> None:
    generator = torch.Generator().manual_seed(size + num_values)
    x_RV = torch.randint(-num_values, num_values, (4, size), generator=generator).float() / 7
    assert first_largest(x_RV)[0].tolist() == [expected(row, 1)[0] for row in x_RV.tolist()]
    for num in (1, 3, 16, 64, 129, size // 2, size - 1, size):
        assert largest(x_RV, num)[1].tolist() == [expected(row, num) for row in x_RV.tolist()]


def test_a_row_with_nan_says_so() -> None:
    x_RV = torch.zeros(3, 1024)
    x_RV[1, 700] = math.nan
    assert first_largest(x_RV)[1].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_scales(dtype: torch.dtype) -> None:
    x_RV = torch.randn(5, 1337, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(row_sums(x_RV), x_RV.double().sum(-1).float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(scaled(x_RV, 0.577), x_RV.float() * 0.577)
    for bad in (math.nan, math.inf, -math.inf):
        x_RV[3, 1336] = bad
        assert row_sums(x_RV).isfinite().tolist() == [True, True, True, False, True]


def test_negative_nan_is_nan_too() -> None:
    x_RV = torch.tensor([[1.0, -math.nan, 2.0], [-0.0, 0.0, -1.0]])
    ids_R, values_R = first_largest(x_RV)
    assert values_R[0].isnan()
    assert ids_R[1] == 0
