"""The expert MLP kernels on a real GPU against the torch twin on the same GPU.

Shapes: N rows, E experts held, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from expert_worker.kernels import reference
from grokmoe.model_config import Gelu
from tests.expert_worker.expert_mlp_cases import DTYPES, ROUTINGS, Case, Sea, assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", Gelu)
@pytest.mark.parametrize(("D", "F"), [(136, 200), (1024, 2048)], ids=str)
@pytest.mark.parametrize("counts_E", ROUTINGS.values(), ids=ROUTINGS)
def test_kernels_match_twin(counts_E: Sequence[int], D: int, F: int, gelu: Gelu, dtype: torch.dtype) -> None:
    """Aligned tensors, twice, bit for bit; then slices in a sea of NaN, whose strides allow no wide loads."""
    pytest.importorskip("triton")
    from expert_worker.kernels.grouped_gemm import expert_mlp, launch

    assert not torch.backends.cuda.matmul.allow_tf32, "the twin would round its operands"
    case = Case.random(counts_E, D, F, dtype, gelu, device="cuda")
    expected = reference.expert_mlp(*case.arguments)
    actual = expert_mlp(*case.arguments)
    assert_close(actual, expected)
    assert torch.equal(actual, expert_mlp(*case.arguments)), "two runs differ"

    rows, gate, up, down = (Sea.around(tensor).island for tensor in case.tensors)
    empty = [case.rows.new_full((case.num_rows, columns), torch.nan) for columns in (F, D)]
    h, out = (Sea.around(tensor) for tensor in empty)
    launch(rows, counts_E, gate, up, down, gelu, h.island, out.island)
    assert_close(out.island, expected)
    assert h.is_calm()
    assert out.is_calm()


@pytest.mark.parametrize("rows_in_8_bits", [False, True])
@pytest.mark.parametrize("counts_E", [[3, 0, 9], [130, 1, 70]], ids=str)
def test_eight_bits_match_twin(counts_E: Sequence[int], rows_in_8_bits: bool) -> None:
    """Weights with a scale per channel; rows as they are, or with a scale each."""
    pytest.importorskip("triton")
    from expert_worker.kernels.grouped_gemm import expert_mlp

    if rows_in_8_bits and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no tiles for this device")
    case = Case.random([max(count, 1) for count in counts_E], 1024, 2048, torch.bfloat16, Gelu.ERF, device="cuda")
    rows = case.rows[: sum(counts_E)]
    pairs = [reference.quantise_rows(weight.flatten(0, 1)) for weight in case.tensors[1:]]
    weights = [q.view(weight.shape) for (q, _), weight in zip(pairs, case.tensors[1:], strict=True)]
    scales = reference.ChannelScales(
        *(scale.view(weight.shape[:2]) for (_, scale), weight in zip(pairs, case.tensors[1:], strict=True))
    )
    expected = reference.expert_mlp(rows, counts_E, *weights, case.gelu, scales, rows_in_8_bits)
    actual = expert_mlp(rows, counts_E, *weights, case.gelu, scales=scales, rows_in_8_bits=rows_in_8_bits)
    error = (actual.float() - expected.float()).square().mean().sqrt()
    assert error <= 4e-3 * expected.float().square().mean().sqrt()


def test_fixed_tiles_give_a_row_the_same_bits_in_any_company() -> None:
    pytest.importorskip("triton")
    from expert_worker.kernels.grouped_gemm import expert_mlp

    case = Case.random([5, 200], 1024, 2048, torch.bfloat16, Gelu.ERF, device="cuda")
    whole = expert_mlp(*case.arguments, fixed_tiles=True)
    for row, counts in ((2, [1, 0]), (41, [0, 1]), (204, [0, 1])):
        alone = expert_mlp(case.rows[row : row + 1], counts, *case.arguments[2:], fixed_tiles=True)
        assert torch.equal(alone[0], whole[row]), row
