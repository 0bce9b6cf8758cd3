"""Experts in int8 on the CPU: the loops against the plain twin, the same bits in any company, and ugly numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expert_worker.expert_dtype import MAX_INT8_INPUTS
from expert_worker.kernels import cpu_int8, int8_loops, reference, reference_int8
from expert_worker.kernels.cpu_int8 import GATE, UP, QuantisedExpert
from expert_worker.kernels.int8_weights import LARGEST, SMALLEST_SCALE, Panels, quantise_rows
from grokmoe.model_config import Gelu
from grokmoe.native import int8_dots
from grokmoe.native.int8_dots import MOST_ROWS, PANEL_OUTPUTS, STEP_INPUTS
from tests.expert_worker.expert_mlp_cases import DTYPES, Case

SIZES = [(48, 80), (33, 70), (64, 32), (1, 1)]
"""Hidden and ffn: within a panel, past one in each direction, exactly one, and the least."""


def quantised(case: Case) -> list[QuantisedExpert]:
    experts = []
    for gate_FD, up_FD, down_DF in zip(case.gate, case.up, case.down, strict=True):
        expert = QuantisedExpert(*down_DF.shape)
        expert.down.put(down_DF)  # in any order
        expert.gate_up.put(up_FD, UP)
        expert.gate_up.put(gate_FD, GATE)
        experts.append(expert)
    return experts


def mlp(
    rows_ND: torch.Tensor, counts: Sequence[int], experts: Sequence[QuantisedExpert], ffn_size: int, gelu: Gelu
) -> torch.Tensor:
    tables = cpu_int8.tables_of(experts)
    return cpu_int8.expert_mlp(rows_ND, torch.tensor(counts), tables, ffn_size, gelu)


def compute(case: Case, experts: Sequence[QuantisedExpert] | None = None) -> torch.Tensor:
    F = case.gate.shape[1]
    return mlp(case.rows, case.counts, experts or quantised(case), F, case.gelu)


def relative_rms(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    error = (actual.double() - wanted.double()).square().mean().sqrt()
    return (error / wanted.double().square().mean().sqrt()).item()


def assert_near_twin(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    """A last bit of h may fall to the other side of a rounding to int8, which is one of 127 steps of one input."""
    assert actual.dtype == wanted.dtype
    assert actual.shape == wanted.shape
    if wanted.numel():
        assert relative_rms(actual, wanted) < 2e-3


@pytest.mark.parametrize("gelu", Gelu)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "F"), SIZES)
def test_kernel_equals_twin(D: int, F: int, dtype: torch.dtype, gelu: Gelu) -> None:
    case = Case.random([2, 0, 9, 1], D, F, dtype, gelu)
    untouched_ND = case.rows.clone()
    assert_near_twin(compute(case), reference_int8.expert_mlp(*case.arguments))
    assert torch.equal(case.rows, untouched_ND)


@given(counts=st.lists(st.sampled_from([0, 0, 1, 2, 5, 6, 7, 13]), min_size=1, max_size=5))
def test_any_routing(counts: list[int]) -> None:
    case = Case.random(counts, 36, 68, torch.bfloat16, Gelu.ERF)
    assert_near_twin(compute(case), reference_int8.expert_mlp(*case.arguments))


def test_it_is_near_what_it_stands_for() -> None:
    """Not the twin's arithmetic, but the MLP itself: a scale that is lost in both would show here."""
    case = Case.random([16], 128, 256, torch.float32, Gelu.ERF)
    case.gate[0, :64] *= 50  # outputs of different sizes have scales of their own
    case.rows[3] *= 1e4
    actual, wanted = compute(case), reference.expert_mlp(*case.arguments)
    for row in range(16):
        assert relative_rms(actual[row], wanted[row]) < 0.06, row


def test_rows_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.random([5, 0, 9, 3], 36, 68, torch.bfloat16, Gelu.ERF)
    expected = compute(case)
    for rows in (1, 4, 7, 16):
        monkeypatch.setattr(cpu_int8, "CHUNK_ROWS", rows)
        assert torch.equal(compute(case), expected), rows


def test_panels_of_several_blocks() -> None:
    """More inputs than rows go through at once."""
    D, F = 8, STEP_INPUTS * int8_loops.BLOCK_STEPS + 6
    case = Case.random([7], D, F, torch.float32, Gelu.ERF)
    assert_near_twin(compute(case), reference_int8.expert_mlp(*case.arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    case = Case.random([64], 96, 160, dtype, Gelu.ERF)
    experts = quantised(case)
    all_ND = compute(case, experts)
    for num_rows in range(1, 65):
        for begin in {0, (64 - num_rows) // 2, 64 - num_rows}:
            rows_ND = case.rows[begin : begin + num_rows]
            some_ND = mlp(rows_ND, [num_rows], experts, 160, case.gelu)
            assert torch.equal(some_ND, all_ND[begin : begin + num_rows]), (num_rows, begin)


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_int8, "GRAIN_BYTES", 1)  # as many threads as there are
    case = Case.random([20, 3], 96, 160, torch.bfloat16, Gelu.ERF)
    experts = quantised(case)
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(compute(case, experts))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_rows_need_not_be_aligned() -> None:
    case = Case.random([3], 48, 80, torch.bfloat16, Gelu.ERF)
    data = bytearray(1) + case.rows.view(torch.uint8).numpy().tobytes()
    shifted_ND = torch.frombuffer(data, dtype=torch.bfloat16, offset=1).view(3, -1)
    assert torch.equal(mlp(shifted_ND, [3], quantised(case), 80, case.gelu), compute(case))


def dots(function: object, x_NI: np.ndarray, panel_SOI: np.ndarray, begin: int) -> np.ndarray:
    sums_NO = np.full((len(x_NI), PANEL_OUTPUTS), begin, np.int32)
    x, panel, sums = x_NI.ctypes.data, panel_SOI.ctypes.data, sums_NO.ctypes.data
    function(len(x_NI), x, x_NI.strides[0], panel, len(panel_SOI), sums)  # type: ignore[operator]
    return sums_NO


@pytest.mark.parametrize("num_rows", range(1, MOST_ROWS + 1))
@pytest.mark.parametrize("function", [int8_dots.dot_plain, int8_dots.dot_int8], ids=["plain", "instruction"])
def test_dots_are_exact(function: object, num_rows: int) -> None:
    """Also at the ends of both types, where pairs of products do not fit into 16 bits."""
    random = np.random.default_rng(num_rows)
    for num_steps in (1, 3, 40):
        x_NI = random.integers(-128, 128, (num_rows, num_steps * STEP_INPUTS + 9), np.int8, endpoint=False)
        panel_SOI = random.integers(0, 256, (num_steps, PANEL_OUTPUTS, STEP_INPUTS), np.uint8, endpoint=False)
        x_NI[0, :4], panel_SOI[0, 0] = 127, 255
        x_NI[-1, :4], panel_SOI[0, 1] = -128, 255
        used_NI = x_NI[:, : num_steps * STEP_INPUTS].astype(np.int64)
        weight_OI = panel_SOI.transpose(1, 0, 2).reshape(PANEL_OUTPUTS, -1).astype(np.int64)
        assert np.array_equal(dots(function, x_NI, panel_SOI, 5), used_NI @ weight_OI.T + 5)


def test_the_longest_row_fits() -> None:
    """The largest sum that there can be."""
    num_steps = MAX_INT8_INPUTS // STEP_INPUTS
    x_NI = np.full((1, MAX_INT8_INPUTS), LARGEST, np.int8)
    panel_SOI = np.full((num_steps, PANEL_OUTPUTS, STEP_INPUTS), 255, np.uint8)
    expected = 255 * LARGEST * MAX_INT8_INPUTS
    assert expected < 2**31
    assert (dots(int8_dots.dot_int8, x_NI, panel_SOI, 0) == expected).all()


def test_the_instruction_is_used_here() -> None:
    """Else the tests above compare the plain loop with itself."""
    cpu_info = Path("/proc/cpuinfo")
    if not cpu_info.exists() or "avx512_vnni" not in cpu_info.read_text():
        pytest.skip("this CPU has no such instruction")
    assert int8_dots.has_int8_dots()
    assert int8_dots.dot_int8 is not int8_dots.dot_plain


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(rows=st.integers(1, 20).flatmap(lambda n: st.lists(st.lists(floats, min_size=n, max_size=n), min_size=1)))
def test_quantised_rows(rows: list[list[float]]) -> None:
    """The loop's integers are the twin's, and within half a step of the numbers."""
    x_NI = torch.tensor(rows, dtype=torch.float32)
    N, num_inputs = x_NI.shape
    room = cpu_int8.new_rows(N, num_inputs)
    room.q.fill_(99)
    int8_loops.quantise(torch.float32, N, num_inputs, room.q.shape[1], x_NI, *room)
    twin = quantise_rows(x_NI)
    assert torch.equal(room.scales, twin.scale)
    assert (room.q[:, :num_inputs].int() - twin.q.int()).abs().max() <= 1, "a product is rounded where it is contracted"
    assert not room.q[:, num_inputs:].any()
    assert torch.equal(room.offsets, -int8_dots.WEIGHT_OFFSET * room.q.sum(1, dtype=torch.int32))
    assert room.q.min() >= -LARGEST
    error = (x_NI.double() - room.q[:, :num_inputs].double() * room.scales.double()[:, None]).abs()
    assert (error <= 0.5001 * room.scales.double()[:, None]).all()


@pytest.mark.parametrize("matrices", [1, 2])
def test_panels_hold_the_weights(matrices: int) -> None:
    weights = [torch.randn(70, 37, generator=torch.Generator().manual_seed(n)) for n in range(matrices)]
    panels = Panels(70, 37, matrices)
    for number, weight_OI in enumerate(weights):
        panels.put(weight_OI, number)
    each = PANEL_OUTPUTS // matrices
    for number, weight_OI in enumerate(weights):
        q_OI, scale_O = quantise_rows(weight_OI)
        assert (q_OI.double() * scale_O[:, None] - weight_OI).abs().max() <= 0.501 * scale_O.max()
        for output, i in itertools.product((0, 31, 32, 69), (0, 4, 36)):
            panel, place = output // each, number * each + output % each
            byte = panels.bytes_PSOI[panel, i // STEP_INPUTS, place, i % STEP_INPUTS].item()
            assert byte - int8_dots.WEIGHT_OFFSET == q_OI[output, i].item()
            assert panels.scales_PO[panel, place] == scale_O[output]
    assert cpu_int8.panel_bytes(70, 37, matrices) == panels.bytes_PSOI.nbytes + panels.scales_PO.nbytes


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_not_finite_has_no_finite_output(dtype: torch.dtype, bad: float) -> None:
    """Wherever it is in the row, and the rows beside it are what they are without it."""
    case = Case.random([8], 48, 80, dtype, Gelu.TANH)
    experts = quantised(case)
    expected = compute(case, experts)
    for row, column in ((0, 0), (5, 47), (7, 20)):
        rows_ND = case.rows.clone()
        rows_ND[row, column] = bad
        out_ND = mlp(rows_ND, [8], experts, 80, case.gelu)
        assert not out_ND[row].isfinite().any()
        others = torch.arange(8) != row
        assert torch.equal(out_ND[others], expected[others])


@pytest.mark.parametrize("part", ["gate", "up", "down"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(part: str, bad: float) -> None:
    """In gate and up every output depends on it, in down the one whose row it is in."""
    case = Case.random([3], 48, 80, torch.float32, Gelu.ERF)
    getattr(case, part)[0, 7, 5] = bad
    out_ND = compute(case)
    if part == "down":
        assert not out_ND[:, 7].isfinite().any()
        assert out_ND[:, :7].isfinite().all()
        assert out_ND[:, 8:].isfinite().all()
    else:
        assert not out_ND.isfinite().any()


def test_an_overflow_within_is_not_hidden() -> None:
    """Rows and weights are finite, their product is not."""
    case = Case.random([2], 48, 80, torch.float32, Gelu.ERF)
    case.rows[0] = 3e38
    case.gate[0] = case.gate[0].abs() * 1e6
    out_ND = compute(case)
    assert not out_ND[0].isfinite().any()
    assert out_ND[1].isfinite().all()


def test_zeros_give_zeros() -> None:
    case = Case.random([2, 1], 48, 80, torch.bfloat16, Gelu.ERF)
    case.rows[0] = 0
    case.down[1] = 0
    out_ND = compute(case)
    assert not out_ND[0].any()
    assert out_ND[1].any()
    assert not out_ND[2].any()


@pytest.mark.parametrize("size", [1e-45, 1e-40, 2.0**-120, 2.0**-100, 1e-20, 1e10])
def test_numbers_of_any_size(size: float) -> None:
    """What is too small for a scale counts as zero; nothing becomes NaN."""
    case = Case.random([3], 48, 80, torch.float32, Gelu.ERF)
    case.rows.mul_(size)
    case.down.mul_(size)
    out_ND, wanted_ND = compute(case), reference.expert_mlp(*case.arguments)
    assert out_ND.isfinite().all()
    if size < 1e-10:
        assert out_ND.abs().max() <= 1e3 * max(size, SMALLEST_SCALE)
    else:
        assert relative_rms(out_ND, wanted_ND) < 0.06


def test_one_huge_outlier_takes_the_row_along_and_no_other() -> None:
    case = Case.random([4], 48, 80, torch.float32, Gelu.ERF)
    experts = quantised(case)
    expected = compute(case, experts)
    case.rows[2, 9] = 1e12
    out_ND = compute(case, experts)
    assert out_ND.isfinite().all()
    assert torch.equal(out_ND[[0, 1, 3]], expected[[0, 1, 3]])
    assert_near_twin(out_ND, reference_int8.expert_mlp(*case.arguments))


def test_no_rows() -> None:
    case = Case.random([0, 0], 48, 80, torch.bfloat16, Gelu.ERF)
    assert compute(case).shape == (0, 48)
