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
@pytest.mark.parametrize(
    ("counts_E", "D", "F"),
    [*(([3, 0, 2], *size) for size in SIZES.values()), ([70, 0, 5], *SIZES["one past"])],
    ids=str,
)
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


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("is_gated_by_tma", [False, True], ids=["pointers", "copy engine"])
def test_variants_match_twin(
    grouped_gemm: ModuleType, monkeypatch: pytest.MonkeyPatch, is_gated_by_tma: bool, swap: bool
) -> None:
    """Each operand order and way of fetching; several pieces for one program, blocks that cross an expert's end."""
    from expert_worker.kernels.grouped_tiles import Blocks, TileClass

    device = grouped_gemm.describe(torch.device("cpu"))._replace(has_tma=is_gated_by_tma)
    monkeypatch.setattr(grouped_gemm, "describe", lambda _: device)
    case = Case.random([3, 0, 20], 48, 80, torch.bfloat16, Gelu.ERF)
    blocks = Blocks(64, 32, 4, 2, 2)
    h, out = torch.empty(case.num_rows, 80, dtype=torch.bfloat16), torch.empty_like(case.rows)
    launched = record_launches(grouped_gemm, monkeypatch)
    grouped_gemm.launch(*case.arguments, h, out, classes=(TileClass(16, swap, blocks, blocks),))
    assert_close(out, reference.expert_mlp(*case.arguments))
    assert launched == [{"TMA": is_gated_by_tma, "SWAP": swap, "programs": 2}] * 2


def record_launches(grouped_gemm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Of each launch from now on which variant it was."""
    launched: list[dict[str, object]] = []
    kernel = grouped_gemm.grouped_kernel

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> object:
            def run(*args: object, **options: object) -> None:
                launched.append({"TMA": options["TMA"], "SWAP": options["SWAP"], "programs": grid[0]})
                kernel[grid](*args, **options)

            return run

    monkeypatch.setattr(grouped_gemm, "grouped_kernel", Recorder())
    return launched


def test_what_the_copy_engine_cannot_fetch_goes_through_pointers(
    grouped_gemm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are not whole 16 bytes apart, and weights that are slices."""
    device = grouped_gemm.describe(torch.device("cpu"))._replace(has_tma=True)
    monkeypatch.setattr(grouped_gemm, "describe", lambda _: device)
    launched = record_launches(grouped_gemm, monkeypatch)
    case = Case.random([3, 2], 20, 40, torch.bfloat16, Gelu.ERF)
    assert_close(grouped_gemm.expert_mlp(*case.arguments), reference.expert_mlp(*case.arguments))
    assert [launch["TMA"] for launch in launched] == [False, True], "rows of D are 40 bytes, those of F 80"
    launched.clear()
    wide = Case.random([3, 2], 32, 64, torch.bfloat16, Gelu.ERF)
    gate, up, down = (Sea.around(tensor, 8).island for tensor in wide.tensors[1:])
    assert_close(
        grouped_gemm.expert_mlp(wide.rows, wide.counts, gate, up, down, wide.gelu),
        reference.expert_mlp(*wide.arguments),
    )
    assert not any(launch["TMA"] for launch in launched)


def test_fixed_tiles_give_a_row_the_same_bits_in_any_company(grouped_gemm: ModuleType) -> None:
    case = Case.random([5, 70], *RAGGED, torch.bfloat16, Gelu.ERF)
    whole = grouped_gemm.expert_mlp(*case.arguments, fixed_tiles=True)
    for row, counts in ((2, [1, 0]), (41, [0, 1])):
        alone = grouped_gemm.expert_mlp(case.rows[row : row + 1], counts, *case.arguments[2:], fixed_tiles=True)
        assert torch.equal(alone[0], whole[row]), row


def in_eight_bits(case: Case) -> tuple[list[torch.Tensor], reference.ChannelScales]:
    """The case's weights, and what they are to be multiplied with."""
    pairs = [reference.quantise_rows(weight.flatten(0, 1)) for weight in case.tensors[1:]]
    weights = [q.view(weight.shape) for (q, _), weight in zip(pairs, case.tensors[1:], strict=True)]
    scales = [scale.view(weight.shape[:2]) for (_, scale), weight in zip(pairs, case.tensors[1:], strict=True)]
    return weights, reference.ChannelScales(*scales)


@pytest.mark.parametrize("has_fp8", [True, False], ids=["known", "unknown to the device"])
@pytest.mark.parametrize("counts_E", [[3, 9], [70, 0]], ids=str)
def test_weights_in_eight_bits(
    grouped_gemm: ModuleType, monkeypatch: pytest.MonkeyPatch, counts_E: list[int], has_fp8: bool
) -> None:
    device = grouped_gemm.describe(torch.device("cpu"))._replace(has_fp8=has_fp8)
    monkeypatch.setattr(grouped_gemm, "describe", lambda _: device)
    case = Case.random([max(count, 1) for count in counts_E], *RAGGED, torch.bfloat16, Gelu.ERF)
    rows = case.rows[: sum(counts_E)]
    weights, scales = in_eight_bits(case)
    expected = reference.expert_mlp(rows, counts_E, *weights, case.gelu, scales)
    assert_close(grouped_gemm.expert_mlp(rows, counts_E, *weights, case.gelu, scales=scales), expected)


def test_rows_and_weights_in_eight_bits(grouped_gemm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the twin's own quantisation; a value of h that is rounded otherwise moves a result by a step of eight bits."""
    device = grouped_gemm.describe(torch.device("cpu"))._replace(family="sm_90")
    monkeypatch.setattr(grouped_gemm, "describe", lambda _: device)
    case = Case.random([3, 9], *RAGGED, torch.bfloat16, Gelu.ERF)
    weights, scales = in_eight_bits(case)
    expected = reference.expert_mlp(case.rows, case.counts, *weights, case.gelu, scales, rows_in_8_bits=True)
    actual = grouped_gemm.expert_mlp(case.rows, case.counts, *weights, case.gelu, scales=scales, rows_in_8_bits=True)
    error = (actual.float() - expected.float()).square().mean().sqrt()
    assert error <= 4e-3 * expected.float().square().mean().sqrt()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_quantised_as_the_twin_does(grouped_gemm: ModuleType, dtype: torch.dtype) -> None:
    """Zeros, one huge value, what is no number: only its own row suffers, and it does."""
    x_NK = torch.randn(6, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    x_NK[1], x_NK[2, 3], x_NK[3, 5], x_NK[4, 6] = 0.0, 1e30, torch.nan, torch.inf
    q_NK, scale_N = grouped_gemm.quantise_rows(x_NK)
    expected_q_NK, expected_scale_N = reference.quantise_rows(x_NK)
    good = [0, 1, 2, 5]
    torch.testing.assert_close(scale_N[good], expected_scale_N[good])
    assert (q_NK.float() == expected_q_NK.float())[good].float().mean() > 0.99
    wide_NK = q_NK.float() * scale_N[:, None]
    assert wide_NK[good].isfinite().all()
    assert wide_NK[3, 5].isnan()
    assert not wide_NK[4].isfinite().any()
