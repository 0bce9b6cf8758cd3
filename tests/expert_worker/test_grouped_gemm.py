"""Values of the expert MLP: torch twin against the formula, interpreted Triton kernels against the twin.

What the kernels compile to is in test_grouped_gemm_compile.py; the same comparison on a GPU in tests/gpu.
Shapes: N rows, E experts held, D hidden, F ffn.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from expert_worker.kernels import reference
from grokmoe.model_config import Gelu
from tests.expert_worker.expert_mlp_cases import DTYPES, ROUTINGS, Case, Sea, assert_close

RAGGED = (136, 200)  # D, F: multiples of no block
SIZES = {"ragged": RAGGED, "whole blocks": (128, 256), "below one block": (24, 40), "one past": (65, 129)}


@pytest.fixture
def grouped_gemm() -> Iterator[ModuleType]:
    """The Triton module, with its kernels running in the interpreter."""
    pytest.importorskip("triton")
    from expert_worker.kernels import grouped_gemm
    from tests.triton_interpreter import interpreted

    with interpreted():
        yield grouped_gemm


def formula(case: Case) -> torch.Tensor:
    """The numerics in float64, row by row; rounded only where the twin says it rounds."""
    expert_ids_N = [expert for expert, count in enumerate(case.counts) for _ in range(count)]
    out_ND = []
    for x_D, expert in zip(case.rows.double(), expert_ids_N, strict=True):
        gate_F = case.gate[expert].double() @ x_D
        up_F = case.up[expert].double() @ x_D
        gelu_F = functional.gelu(gate_F, approximate="tanh" if case.gelu is Gelu.TANH else "none")
        h_F = (gelu_F * up_F).to(case.dtype).double()
        out_ND.append((case.down[expert].double() @ h_F).to(case.dtype))
    return torch.stack(out_ND) if out_ND else torch.empty_like(case.rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", Gelu)
@pytest.mark.parametrize("counts_E", ROUTINGS.values(), ids=ROUTINGS)
def test_twin_is_the_formula(counts_E: Sequence[int], gelu: Gelu, dtype: torch.dtype) -> None:
    case = Case.random(counts_E, *RAGGED, dtype, gelu)
    assert_close(reference.expert_mlp(*case.arguments), formula(case))


def test_the_two_gelus_differ() -> None:
    """Else the comparisons above and below could not tell them apart."""
    cases = [Case.random([9, 4], *RAGGED, torch.bfloat16, gelu) for gelu in Gelu]
    with pytest.raises(AssertionError, match="RMS"):
        assert_close(*[reference.expert_mlp(*case.arguments) for case in cases])


@pytest.mark.parametrize("counts_E", [[3, 3], [4, -1, 4], [7], [7, 0, 0]], ids=str)
def test_counts_that_do_not_fit_are_refused(counts_E: list[int]) -> None:
    case = Case.random([3, 4], 8, 8, torch.float32, Gelu.ERF)
    with pytest.raises(AssertionError, match="count"):
        reference.expert_mlp(case.rows, counts_E, *case.arguments[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts_E", ROUTINGS.values(), ids=ROUTINGS)
def test_kernels_match_twin(grouped_gemm: ModuleType, counts_E: Sequence[int], dtype: torch.dtype) -> None:
    """Contiguous tensors: any access outside them raises OutOfBounds."""
    case = Case.random(counts_E, *RAGGED, dtype, Gelu.ERF)
    assert_close(grouped_gemm.expert_mlp(*case.arguments), reference.expert_mlp(*case.arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "F"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("counts_E", [[3, 0, 2], [70, 0, 5]], ids=str)
def test_kernels_in_a_sea_of_nan(
    grouped_gemm: ModuleType, counts_E: Sequence[int], D: int, F: int, dtype: torch.dtype
) -> None:
    """Every tensor is a slice with NaN around it on every axis: none may reach a result, none may change."""
    case = Case.random(counts_E, D, F, dtype, Gelu.TANH)
    # Each with strides of its own.
    seas = [Sea.around(tensor, width) for width, tensor in enumerate(case.tensors, start=4)]
    rows, gate, up, down = (sea.island for sea in seas)
    h, out = (Sea.around(case.rows.new_full((case.num_rows, width), torch.nan)) for width in (F, D))
    grouped_gemm.launch(rows, counts_E, gate, up, down, case.gelu, h.island, out.island)

    assert_close(out.island, reference.expert_mlp(*case.arguments))
    for name, sea in zip(("rows", "gate", "up", "down", "h", "out"), [*seas, h, out], strict=True):
        assert sea.is_calm(), f"something was written around {name}"
    for sea, tensor in zip(seas, case.tensors, strict=True):
        assert torch.equal(sea.island.nan_to_num(), tensor.nan_to_num()), "an input was written to"


@pytest.mark.parametrize("counts_E", [[6, 3], [70, 3]], ids=str)
def test_a_bad_row_spoils_no_other(grouped_gemm: ModuleType, counts_E: Sequence[int]) -> None:
    case = Case.random(counts_E, *RAGGED, torch.float32, Gelu.TANH)
    expected = reference.expert_mlp(*case.arguments)
    case.rows[4, 7] = torch.nan
    actual = grouped_gemm.expert_mlp(*case.arguments)
    assert actual[4].isnan().all()
    others = [row for row in range(case.num_rows) if row != 4]
    assert_close(actual[others], expected[others])


@pytest.mark.parametrize("gelu", Gelu)
def test_gelu_alone(grouped_gemm: ModuleType, gelu: Gelu) -> None:
    """Weights that pass one value through and set all other factors to 1; at the ends exp overflows."""
    x_N = torch.cat([torch.linspace(-7, 7, 141), torch.tensor([-1e4, -50, 50, 1e4])])
    rows_N2 = torch.stack([x_N, torch.ones_like(x_N)], dim=1)
    gate_112, up_112, down_121 = (torch.tensor(w) for w in ([[[1.0, 0.0]]], [[[0.0, 1.0]]], [[[1.0], [0.0]]]))
    y_N2 = grouped_gemm.expert_mlp(rows_N2, [len(x_N)], gate_112, up_112, down_121, gelu)
    expected_N = functional.gelu(x_N, approximate="tanh" if gelu is Gelu.TANH else "none")
    torch.testing.assert_close(y_N2[:, 0], expected_N, rtol=3e-7, atol=1e-6)


def test_offsets_beyond_31_bits(grouped_gemm: ModuleType, tmp_path: Path) -> None:
    """Experts 2^30 elements apart, rows 2^26: the third expert and its rows are beyond an int32."""
    case = Case.random([16, 16, 2], 24, 40, torch.bfloat16, Gelu.ERF)
    # A sparse file: only the pages that are touched exist.
    num_elements = 5 << 29
    (tmp_path / "ocean").touch()
    os.truncate(tmp_path / "ocean", 2 * num_elements)
    ocean = torch.from_file(str(tmp_path / "ocean"), shared=True, size=num_elements, dtype=torch.bfloat16)

    def spread(shape: Sequence[int], stride: int, start: int) -> torch.Tensor:
        inner = (shape[2],) if len(shape) == 3 else ()
        return ocean.as_strided(shape, (stride, *inner, 1), start)

    weights = [spread(t.shape, 1 << 30, k << 16) for k, t in enumerate(case.tensors[1:])]
    rows, h, out = (spread((34, width), 1 << 26, k << 16) for k, width in ((3, 24), (4, 40), (5, 24)))
    for far, near in zip([rows, *weights], case.tensors, strict=True):
        far.copy_(near)
    grouped_gemm.launch(rows, case.counts, *weights, case.gelu, h, out)
    assert_close(out, reference.expert_mlp(*case.arguments))


@given(counts_E=st.lists(st.integers(0, 300), max_size=12), block_rows=st.sampled_from([16, 64, 128]))
def test_tiles_cover_each_row_once(counts_E: list[int], block_rows: int) -> None:
    pytest.importorskip("triton")
    from expert_worker.kernels.grouped_gemm import tile_table

    tiles = tile_table(counts_E, block_rows)
    covered = []
    for expert, first, end in tiles:
        covered += [(expert, row) for row in range(first, min(first + block_rows, end))]
    experts = [expert for expert, count in enumerate(counts_E) for _ in range(count)]
    assert covered == list(zip(experts, range(sum(counts_E)), strict=True))
    assert all(first < end for _, first, end in tiles)
    assert len(tiles) == sum(-(-count // block_rows) for count in counts_E)


@pytest.mark.parametrize(
    ("counts_E", "rows"),
    [([1, 0], 16), ([16, 16], 16), ([17, 1], 64), ([64], 64), ([0, 65], 128), ([999], 128)],
    ids=str,
)
def test_tile_class_by_busiest_expert(grouped_gemm: ModuleType, counts_E: Sequence[int], rows: int) -> None:
    assert grouped_gemm.tile_class(counts_E, torch.bfloat16).rows == rows
