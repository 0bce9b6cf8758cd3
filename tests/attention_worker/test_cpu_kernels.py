"""The loops of a CPU against plain torch: norms, rotary embedding, the cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_worker.device_kernels import CpuKernels, PlainKernels
from attention_worker.kv_cache import KVCache
from attention_worker.layers import Rope
from attention_worker.step_batch import StepBatch
from grokmoe.step_plan import SequenceChunk

DTYPES = [torch.float32, torch.bfloat16]
CPU, PLAIN = CpuKernels(), PlainKernels()


def same_but_for_rounding(x: torch.Tensor, y: torch.Tensor) -> None:
    assert x.dtype == y.dtype
    tolerance = 2e-6 if x.dtype is torch.float32 else 2**-7
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * 1e-1)


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(0, 70),
    hidden=st.sampled_from([1, 7, 64, 192, 1000]),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_norms(num_rows: int, hidden: int, dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    h_TD = torch.randn(num_rows, hidden, generator=generator)
    y_TD = (size * torch.randn(num_rows, hidden, generator=generator)).to(dtype)
    gain_D = torch.rand(hidden, generator=generator) + 0.5
    same_but_for_rounding(CPU.norm(h_TD, gain_D, 1e-5, dtype), PLAIN.norm(h_TD, gain_D, 1e-5, dtype))
    cpu_TD, plain_TD = h_TD.clone(), h_TD.clone()
    CPU.add_normed(cpu_TD, y_TD, gain_D, 1e-5)
    PLAIN.add_normed(plain_TD, y_TD, gain_D, 1e-5)
    torch.testing.assert_close(cpu_TD, plain_TD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(bad: float) -> None:
    h_TD = torch.ones(4, 64)
    h_TD[2, 5] = bad
    out_TD = CPU.norm(h_TD, torch.ones(64), 1e-5, torch.bfloat16)
    assert out_TD[2, 5].isnan()
    assert out_TD[[0, 1, 3]].isfinite().all()


@settings(max_examples=30, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (6, 2), (4, 4)]),
    head_dim=st.sampled_from([2, 32, 128]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
)
def test_rotary_embedding_and_cache(
    heads: tuple[int, int], head_dim: int, lengths: list[int], dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads = heads
    chunks = [SequenceChunk((1,) * length, 3, (3 * i + 2, 3 * i, 3 * i + 1)) for i, length in enumerate(lengths)]
    batch = StepBatch.build(chunks, 16)
    num_rows = len(batch.positions_T)
    qkv_TX = torch.randn(num_rows, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    rotation = Rope(head_dim, 100, 10000.0).angles(batch.positions_T)
    caches = [KVCache(1, 3 * len(lengths), 16, num_kv_heads, head_dim, dtype) for _ in range(2)]
    queries = [
        kernels.rotate_and_store(qkv_TX, rotation, cache.k_KPSd[0], cache.v_KPSd[0], batch)
        for kernels, cache in zip((CPU, PLAIN), caches, strict=True)
    ]
    assert queries[0].shape == (num_rows, num_heads, head_dim)
    for cpu, plain in zip(
        (queries[0], caches[0].k_KPSd[0], caches[0].v_KPSd[0]),
        (queries[1], caches[1].k_KPSd[0], caches[1].v_KPSd[0]),
        strict=True,
    ):
        torch.testing.assert_close(cpu, plain, rtol=2**-8 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)
