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
