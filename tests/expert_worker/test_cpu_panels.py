"""Expert MLPs by panels, against the plain twin in float32."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from expert_worker.cpu_layers import PackedLayer, PanelLayer
from expert_worker.kernels import cpu_panels, reference
from expert_worker.layers import new_layer
from grokmoe.model_config import TINY, Gelu
from grokmoe.native import has_dots
from grokmoe.native.gelu import gelu_erf, gelu_tanh
from grokmoe.panels import to_panels
from tests.expert_worker.expert_mlp_cases import ROUTINGS, Case
from tests.expert_worker.small_model import assert_near

pytestmark = pytest.mark.skipif(not has_dots(), reason="this CPU has no dot products of bfloat16")


def compute(case: Case, rows_ND: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    panels = [list(map(to_panels, parts)) for parts in zip(case.gate, case.up, case.down, strict=True)]
    addresses_E3 = torch.tensor([[part.data_ptr() for part in parts] for parts in panels])
    return cpu_panels.expert_mlp(rows_ND, torch.tensor(counts), addresses_E3, case.gate.shape[1], case.gelu)


@pytest.mark.parametrize("gelu", Gelu)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_kernel_equals_twin(routing: list[int], gelu: Gelu) -> None:
    case = Case.random(routing, 48, 96, torch.bfloat16, gelu)
    untouched_ND = case.rows.clone()
    assert_near(compute(case, case.rows, case.counts), reference.expert_mlp(*case.arguments))
    assert torch.equal(case.rows, untouched_ND)


@pytest.mark.parametrize("gelu", Gelu)
def test_gelu_far_from_zero(gelu: Gelu) -> None:
    """Where it is the identity, where it is zero, and where it is nearly so."""
    function = {Gelu.ERF: gelu_erf, Gelu.TANH: gelu_tanh}[gelu]
    x = torch.linspace(-12, 12, 4001)
    expected = torch.nn.functional.gelu(x.double(), approximate="none" if gelu is Gelu.ERF else "tanh")
    actual = torch.tensor([function(value) for value in x.numpy()], dtype=torch.float64)
    assert (actual - expected).abs().max() < 1e-6
    for value in (-1e30, -40.0, 40.0, 1e30):
        assert function(torch.tensor(value).numpy()[()]) == pytest.approx(max(value, 0.0), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_s_bits_are_its_own(num_threads: int) -> None:
    counts = [40, 0, 1, 13, 7]
    case = Case.random(counts, 256, 512, torch.bfloat16, Gelu.ERF)
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together_ND = compute(case, case.rows, counts)
        row = 0
        for expert, count in enumerate(counts):
            for num in sorted({1, 2, 12, 13, count} & set(range(1, count + 1))):
                alone = [num if other == expert else 0 for other in range(5)]
                part = slice(row + count - num, row + count)
                assert torch.equal(compute(case, case.rows[part], alone), together_ND[part]), (expert, num)
            row += count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_its_row(bad: float) -> None:
    case = Case.random([5, 9], 64, 128, torch.bfloat16, Gelu.ERF)
    good_ND = compute(case, case.rows, case.counts)
    rows_ND = case.rows.clone()
    rows_ND[6, 3] = bad
    out_ND = compute(case, rows_ND, case.counts)
    assert not out_ND[6].isfinite().any()
    out_ND[6] = good_ND[6]
    assert torch.equal(out_ND, good_ND)


def test_which_layers_use_them() -> None:
    cpu = torch.device("cpu")
    assert isinstance(new_layer(TINY, torch.bfloat16, cpu), PanelLayer)
    assert isinstance(new_layer(TINY, torch.float32, cpu), PackedLayer)


def test_a_resized_layer_shares_what_stays() -> None:
    case = Case.random([3, 4], TINY.hidden_size, TINY.intermediate_size, torch.bfloat16, TINY.gelu)
    layer = new_layer(TINY, torch.bfloat16, torch.device("cpu")).resized((2, 5))
    for index, expert in enumerate((2, 5)):
        layer.put(expert, "linear", case.gate[index])
        layer.put(expert, "linear_v", case.up[index])
        layer.put(expert, "linear_1", case.down[index])
    expected_ND = layer.forward((2, 5), (3, 4), case.rows)
    more = layer.resized((2, 3, 5))
    del layer
    for linear, weights in (("linear", case.gate), ("linear_v", case.up), ("linear_1", case.down)):
        more.put(3, linear, weights[0])  # type: ignore[arg-type]
    assert torch.equal(more.forward((2, 5), (3, 4), case.rows), expected_ND)
    assert torch.equal(more.forward((3, 5), (3, 4), case.rows), expected_ND)
    assert torch.equal(more.resized((5,)).forward((5,), (4,), case.rows[3:]), expected_ND[3:])
