"""The attention worker's Triton kernels on a real GPU against the plain twins, and its engine against the goldens."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from attention_worker.config import AttentionWorkerSettings
from attention_worker.device_kernels import PlainKernels, TritonKernels
from attention_worker.engine import AttentionEngine
from attention_worker.kernels import reference
from attention_worker.kv_cache import KVCache
from attention_worker.layers import Rope
from attention_worker.loading import load_engine
from attention_worker.step_batch import StepBatch
from grokmoe.device_thread import DeviceThread
from grokmoe.step_plan import GREEDY, LogitsScope, SequenceChunk
from grokmoe.telemetry import AttentionMetrics, new_registry
from tests import goldens
from tests.attention_worker.test_paged_attention import Step, make_step
from tests.attention_worker.tiny_engine import run_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
MIXED = [(0, 1), (5, 1), (40, 33), (600, 1), (1100, 3), (0, 300), (7999, 1)]
"""(start, tokens)."""


def on_gpu(step: Step) -> Step:
    return dataclasses.replace(
        step,
        q_THd=step.q_THd.to(CUDA),
        k_KPSd=step.k_KPSd.to(CUDA),
        v_KPSd=step.v_KPSd.to(CUDA),
        batch=step.batch.to(CUDA),
    )


@pytest.mark.parametrize("cap", [30.0, 1000.0])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention(dtype: torch.dtype, head_dim: int, deterministic: bool, cap: float) -> None:
    """Against the twin in float32; twice, bit for bit. Slots without a token are NaN."""
    from attention_worker.kernels.triton_attention import paged_attention

    step = on_gpu(make_step(MIXED, page_size=32, num_heads=12, num_kv_heads=2, head_dim=head_dim, dtype=dtype))
    step.cap = cap
    kernel = functools.partial(paged_attention, deterministic=deterministic)
    out = step.run(kernel)
    assert torch.equal(out, step.run(kernel)), "two runs differ"
    error = out.float() - step.expected()
    if dtype is torch.float32:
        assert error.abs().max() <= max(1e-5, cap * 1e-6)
    else:
        assert error.square().mean().sqrt() <= 4e-3 * step.expected().square().mean().sqrt()


def test_deterministic_rows_do_not_depend_on_their_company() -> None:
    from attention_worker.kernels.triton_attention import paged_attention

    step = on_gpu(make_step([(1020, 40), (0, 300)], num_heads=12, head_dim=128, dtype=torch.bfloat16))
    kernel = functools.partial(paged_attention, deterministic=True)
    whole, pages = step.run(kernel), step.batch.chunks[0].page_ids
    for row in range(40):
        alone = StepBatch.build([SequenceChunk((1,), 1020 + row, pages)], 16).to(CUDA)
        part = Step(step.q_THd[row : row + 1], step.k_KPSd, step.v_KPSd, alone).run(kernel)
        assert torch.equal(part[0], whole[row]), row


def test_keys_and_values_in_eight_bits() -> None:
    from attention_worker.kernels.triton_attention import KVScales, paged_attention

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device does not know the type")
    step = make_step(MIXED, page_size=32, head_dim=128, dtype=torch.bfloat16, canaries=False)
    scales = KVScales(k=1 / 64, v=1 / 32)
    k8, v8 = ((x.float() / s).to(torch.float8_e4m3fn) for x, s in zip((step.k_KPSd, step.v_KPSd), scales, strict=True))
    wide = on_gpu(Step(step.q_THd, k8.float() * scales.k, v8.float() * scales.v, step.batch))
    out = paged_attention(wide.q_THd, k8.to(CUDA), v8.to(CUDA), wide.batch, 128**-0.5, 30.0, scales=scales)
    error = out.float() - wide.expected()
    assert error.square().mean().sqrt() <= 4e-3 * wide.expected().square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_around_attention(dtype: torch.dtype) -> None:
    """Norms, rotary embedding, the cache and the gate at Grok-1's widths."""
    from attention_worker.kernels import triton_gate

    kernels, plain = TritonKernels(), PlainKernels()
    tolerance = {"rtol": 2**-7, "atol": 2**-9} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    h_TD, y_TD = torch.randn(2, 70, 6144, device=CUDA)
    gains = torch.rand(2, 6144, device=CUDA) + 0.5
    sums = [h_TD.clone(), h_TD.clone()]
    x_TD, expected_TD = (
        how.add_normed_then_norm(h, y_TD.to(dtype), *gains, 1e-5, dtype)
        for how, h in zip((kernels, plain), sums, strict=True)
    )
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_TD, expected_TD, **tolerance)

    batch = StepBatch.build([SequenceChunk((1,) * 70, 3, (2, 0, 1))], 32).to(CUDA)
    qkv_TX = torch.randn(70, 64 * 128, device=CUDA).to(dtype)
    rotation = Rope(128, 100, 10000.0, CUDA).angles(batch.positions_T)
    caches = [KVCache(1, 4, 32, 8, 128, dtype, CUDA) for _ in range(2)]
    queries = [
        how.rotate_and_store(qkv_TX, rotation, cache.k_KPSd[0], cache.v_KPSd[0], batch)
        for how, cache in zip((kernels, plain), caches, strict=True)
    ]
    torch.testing.assert_close(*queries, **tolerance)
    torch.testing.assert_close(caches[0].k_KPSd[0], caches[1].k_KPSd[0], **tolerance)
    assert torch.equal(caches[0].v_KPSd[0], caches[1].v_KPSd[0])

    gate_ED = torch.randn(8, 6144, device=CUDA) / 78
    actual, expected = (gate(h_TD, gate_ED, 2, 30.0, True) for gate in (triton_gate.gate, reference.gate))
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-5)


@functools.cache
def gpu_engine() -> AttentionEngine:
    """tiny-a as `python -m attention_worker --device cuda --dtype float32` has it."""
    settings = AttentionWorkerSettings(
        model=str(goldens.DIRECTORY), dtype="float32", device="cuda", page_size=8, num_pages=64, threads=1
    )
    return load_engine(settings, AttentionMetrics(new_registry()), DeviceThread("test-gpu"))


@pytest.mark.parametrize("prompt", [*goldens.PROMPTS])
def test_golden_logits_and_tokens(prompt: str) -> None:
    """The experts' part is computed by the plain reference, on the CPU."""
    assert not torch.backends.cuda.matmul.allow_tf32, "products would round their operands"
    engine, token_ids = gpu_engine(), list(goldens.PROMPTS[prompt])
    pages, start = tuple(range(12)), 0
    while len(token_ids) < len(goldens.PROMPTS[prompt]) + 16:
        chunk = SequenceChunk(
            tuple(token_ids[start:]), start, pages[: -(-len(token_ids) // 8)], GREEDY,
            LogitsScope.ALL if start == 0 else LogitsScope.NONE,
        )  # fmt: skip
        result = run_step(engine, chunk)
        if start == 0 and goldens.has_logits("seed"):
            assert result.logits is not None
            assert (result.logits - goldens.logits("seed", prompt)).abs().max() < 1e-4
        start = len(token_ids)
        token_ids += result.token_ids
    assert token_ids[len(goldens.PROMPTS[prompt]) :] == goldens.greedy("seed", prompt)
