"""The Triton kernels around attention, interpreted, against plain torch: norms, rotary embedding, cache, gate."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from attention_worker.device_kernels import PlainKernels, TritonKernels
from attention_worker.kernels import reference
from attention_worker.kv_cache import KVCache
from attention_worker.layers import Rope
from attention_worker.step_batch import StepBatch
from grokmoe.step_plan import SequenceChunk
from router.gating import gate as router_gate
from tests import goldens

DTYPES = [torch.float32, torch.bfloat16]
PLAIN = PlainKernels()


@pytest.fixture
def kernels() -> Iterator[TritonKernels]:
    """In the interpreter: what reads or writes outside a tensor raises."""
    pytest.importorskip("triton")
    from tests.triton_interpreter import interpreted

    with interpreted():
        yield TritonKernels()


def same_but_for_rounding(x: torch.Tensor, y: torch.Tensor) -> None:
    assert x.dtype == y.dtype
    tolerance = 2e-6 if x.dtype is torch.float32 else 2**-7
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * 1e-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "hidden"), [(0, 64), (3, 7), (5, 192)])
@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_norms(kernels: TritonKernels, num_rows: int, hidden: int, dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    h_TD = torch.randn(num_rows, hidden, generator=generator)
    y_TD = (size * torch.randn(num_rows, hidden, generator=generator)).to(dtype)
    y_gain_D, h_gain_D = torch.rand(2, hidden, generator=generator) + 0.5
    same_but_for_rounding(kernels.norm(h_TD, h_gain_D, 1e-5, dtype), PLAIN.norm(h_TD, h_gain_D, 1e-5, dtype))
    sums = [h_TD.clone() for _ in range(3)]
    kernels.add_normed(sums[0], y_TD, y_gain_D, 1e-5)
    x_TD = kernels.add_normed_then_norm(sums[1], y_TD, y_gain_D, h_gain_D, 1e-5, dtype)
    expected_TD = PLAIN.add_normed_then_norm(sums[2], y_TD, y_gain_D, h_gain_D, 1e-5, dtype)
    torch.testing.assert_close(sums[0], sums[2], rtol=1e-5, atol=1e-5)
    assert torch.equal(sums[0], sums[1])
    same_but_for_rounding(x_TD, expected_TD)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_in_its_row(kernels: TritonKernels, bad: float) -> None:
    h_TD = torch.ones(4, 64)
    h_TD[2, 5] = bad
    out_TD = kernels.norm(h_TD, torch.ones(64), 1e-5, torch.bfloat16)
    assert out_TD[2, 5].isnan()
    assert out_TD[[0, 1, 3]].isfinite().all()


def rotary_case(dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> tuple[torch.Tensor, StepBatch, Rope]:
    chunks = [SequenceChunk((1,) * length, 3, (2 * i + 1, 2 * i)) for i, length in enumerate((9, 1))]
    batch = StepBatch.build(chunks, 8)
    width = (heads[0] + 2 * heads[1]) * head_dim
    qkv_TX = torch.randn(10, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    return qkv_TX, batch, Rope(head_dim, 100, 10000.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [((1, 1), 2), ((6, 2), 32)], ids=str)
def test_rotary_embedding_and_cache(
    kernels: TritonKernels, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    """Queries, and both caches whole: nothing is written but to the slots of the step."""
    qkv_TX, batch, rope = rotary_case(dtype, heads, head_dim)
    rotation = rope.angles(batch.positions_T)
    caches = [KVCache(1, 4, 8, heads[1], head_dim, dtype) for _ in range(2)]
    pairs = [
        (implementation.rotate_and_store(qkv_TX, rotation, cache.k_KPSd[0], cache.v_KPSd[0], batch), cache)
        for implementation, cache in zip((kernels, PLAIN), caches, strict=True)
    ]
    (q_THd, cache), (expected_THd, expected) = pairs
    assert torch.equal(cache.v_KPSd[0], expected.v_KPSd[0])
    for actual, plain in ((q_THd, expected_THd), (cache.k_KPSd[0], expected.k_KPSd[0])):
        torch.testing.assert_close(actual, plain, rtol=2**-8 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)


def test_a_cache_in_eight_bits(kernels: TritonKernels) -> None:
    """Scaled, rounded to the nearest; what is too large is the largest there is, and infinity no number."""
    from attention_worker.kernels import triton_rotary
    from attention_worker.kernels.triton_attention import KVScales

    qkv_TX, batch, rope = rotary_case(torch.float32, (6, 2), 32)
    qkv_TX[4, -1], qkv_TX[5, -1], qkv_TX[6, -1] = 1e6, math.nan, math.inf
    rotation, scales = rope.angles(batch.positions_T), KVScales(k=1 / 128, v=1 / 64)
    wide = KVCache(1, 4, 8, 2, 32, torch.float32)
    PLAIN.rotate_and_store(qkv_TX, rotation, wide.k_KPSd[0], wide.v_KPSd[0], batch)
    narrow = KVCache(1, 4, 8, 2, 32, torch.float8_e4m3fn)
    k_KPSd, v_KPSd = narrow.k_KPSd[0], narrow.v_KPSd[0]
    triton_rotary.rotate_and_store(qkv_TX, rotation.cos, rotation.sin, k_KPSd, v_KPSd, batch.slots_T, scales)
    for actual, exact, scale in zip((k_KPSd, v_KPSd), (wide.k_KPSd[0], wide.v_KPSd[0]), scales, strict=True):
        exact = exact.masked_fill(exact.isinf(), math.nan)
        expected = (exact / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        torch.testing.assert_close(actual.float(), expected, rtol=2**-3, atol=2**-9, equal_nan=True)
        assert (actual.float().nan_to_num() == expected.nan_to_num()).float().mean() > 0.97, "more than ties differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize(("num_experts", "num_ranks", "renormalize"), [(8, 2, True), (5, 3, False)])
def test_gate(
    kernels: TritonKernels, num_experts: int, num_ranks: int, renormalize: bool, cap: float | None, dtype: torch.dtype
) -> None:
    from attention_worker.kernels import triton_gate

    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(6, 700, generator=generator).to(dtype)
    gate_ED = torch.randn(num_experts, 700, generator=generator) / 5
    x_TD[1] = 0.0  # all experts alike: the first ones
    x_TD[4, 9] = math.nan
    weights_TK, ids_TK = triton_gate.gate(x_TD, gate_ED, num_ranks, cap, renormalize)
    expected_TK, expected_ids_TK = reference.gate(x_TD, gate_ED, num_ranks, cap, renormalize)
    assert torch.equal(ids_TK, expected_ids_TK)
    torch.testing.assert_close(weights_TK, expected_TK, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert weights_TK[4].isnan().all()


def test_the_twin_of_the_gate_is_the_routers() -> None:
    config = goldens.config()
    generator = torch.Generator().manual_seed(2)
    x_TD = torch.randn(50, config.hidden_size, generator=generator)
    gate_ED = torch.randn(config.num_experts, config.hidden_size, generator=generator)
    x_TD[7] = 0.0
    x_TD[9] = math.nan
    choices = (config.experts_per_token, config.router_cap, config.renormalize_gates)
    weights_TK, ids_TK = reference.gate(x_TD, gate_ED, *choices)
    expected_TK, expected_ids_TK = router_gate(x_TD, gate_ED, config)
    assert torch.equal(ids_TK, expected_ids_TK)
    torch.testing.assert_close(weights_TK, expected_TK, rtol=1e-5, atol=1e-6, equal_nan=True)
