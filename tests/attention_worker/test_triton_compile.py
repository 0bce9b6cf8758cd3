"""What the attention worker's Triton kernels compile to at Grok-1's size: they fit the device and use its matrix units.

No GPU is needed. Values are tested in test_triton_attention.py and test_triton_layers.py.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import numpy as np
import torch

from attention_worker.kernels import triton_attention, triton_gate, triton_lora, triton_norm, triton_rotary
from attention_worker.kernels.low_rank import OUT, QKV, Projections, Segments
from attention_worker.step_batch import StepBatch
from grokmoe.model_config import GROK1
from grokmoe.step_plan import SequenceChunk
from tests.triton_compile import (
    GFX_942,
    SM_80,
    SM_90,
    SM_100,
    Compiled,
    GPUTarget,
    assert_fits,
    compiling,
)

PAGE = 32
DECODE, PREFILL = (8000, 1), (0, 2048)
"""(start, tokens)."""
D, H, K = GROK1.hidden_size, GROK1.num_heads, GROK1.num_kv_heads

MATRIX_UNIT = {SM_80: "HMMA", SM_90: "HGMMA", SM_100: "UTCHMMA", GFX_942: "v_mfma"}
"""Instructions of each architecture's largest products, which take 64 rows or more."""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compiled_attention(
    target: GPUTarget,
    span: tuple[int, int],
    head_dim: int = GROK1.head_dim,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype = torch.bfloat16,
    deterministic: bool = False,
) -> list[Compiled]:
    """The launches of one layer's attention for one sequence."""
    start, length = span
    pages = tuple(range(-(-(start + length) // PAGE)))
    batch = StepBatch.build([SequenceChunk((1,) * length, start, pages)], PAGE)
    cache = meta(K, 4096, PAGE, head_dim, dtype=kv_dtype)
    with pytest.MonkeyPatch.context() as patch, compiling(target) as launches:
        patch.setattr(triton_attention, "num_processors", lambda device: 132)
        q_THd = meta(length, H, head_dim, dtype=dtype)
        triton_attention.paged_attention(q_THd, cache, cache, batch, head_dim**-0.5, 30.0, deterministic)
    for kernel in launches:
        assert_fits(target, kernel)
    return launches


@pytest.mark.parametrize("target", [SM_80, SM_90, SM_100, GFX_942], ids=lambda target: str(target.arch))
def test_prefill(target: GPUTarget) -> None:
    (kernel,) = compiled_attention(target, PREFILL)
    assert kernel.count(MATRIX_UNIT[target]), kernel.opcodes
    assert kernel.grid == (-(-PREFILL[1] // (128 // 6)), K)
    if target is not GFX_942:
        assert "LDGSTS.E.BYPASS.128" in kernel.opcodes, "keys are not fetched ahead"


def test_decode_is_split_until_the_chip_is_full() -> None:
    kernel, add_up = compiled_attention(SM_90, DECODE)
    assert kernel.count("HMMA"), kernel.opcodes
    assert kernel.grid == (32, K)
    assert add_up.grid == (1, H)


@pytest.mark.parametrize(
    "options",
    [{"kv_dtype": torch.float8_e4m3fn}, {"head_dim": 64}, {"deterministic": True}],
    ids=["eight bits", "head size 64", "deterministic"],
)
def test_variants(options: dict[str, object]) -> None:
    kernel, *_ = compiled_attention(SM_90, PREFILL, **options)  # type: ignore[arg-type]
    assert kernel.count("HGMMA"), kernel.opcodes


def test_float32() -> None:
    kernel, _ = compiled_attention(SM_80, DECODE, dtype=torch.float32, kv_dtype=torch.float32)
    # Plain float32 arithmetic: tensor cores would round the operands to TF32.
    assert kernel.count("FFMA"), kernel.opcodes
    assert kernel.count("HMMA") == 0, kernel.opcodes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("projections", [QKV, OUT], ids=["qkv", "o"])
@pytest.mark.parametrize("target", [SM_80, SM_90, SM_100, GFX_942], ids=lambda target: str(target.arch))
def test_corrections_of_low_rank(target: GPUTarget, projections: Projections, dtype: torch.dtype) -> None:
    """Two adapters of rank 16 in a decode step of 32: products on the matrix units, nothing moved one by one, though
    the kernels have but the addresses of the weights."""
    outs = {QKV: (D, K * 128, K * 128), OUT: (D,)}[projections]
    entries = [(0, 0, 16, 0, num_out, 0) for num_out in (*outs, 0, 0, 0)]
    entries = entries[:4] if projections is QKV else [*entries[1:4], entries[0]]
    table = np.array([[entries, entries]])
    segments = Segments(np.arange(32), (20, 12), (), table)
    x_TI, y_TO = meta(32, D, dtype=dtype), meta(32, sum(outs), dtype=dtype)
    with pytest.MonkeyPatch.context() as patch, compiling(target) as launches:
        patch.setattr(triton_lora, "to_device", lambda tensor, device: tensor.to(device))
        triton_lora.add_low_rank(y_TO, x_TI, segments, 0, projections)
    into, out_of = launches
    for kernel in launches:
        assert_fits(target, kernel)
        if dtype is torch.bfloat16:
            assert kernel.count("HMMA", "v_mfma"), kernel.opcodes
        assert kernel.count("LDG.E.U16", "STG.E.U16") == 0, "weights or outputs are moved one by one"
    assert (into.grid, out_of.grid) == ((3, len(outs), 4), (3, D // 128, len(outs)))


def test_small_kernels() -> None:
    T, wide = 2048, torch.float32
    angles, gain_D = meta(T, 1, 128, dtype=wide), meta(D, dtype=wide)
    cache = meta(K, 4096, PAGE, 128)
    with compiling(SM_90) as launches:
        triton_norm.add_normed_then_norm(meta(T, D, dtype=wide), meta(T, D), gain_D, gain_D, 1e-5, torch.bfloat16)
        qkv_TX, slots_T = meta(T, (H + 2 * K) * 128), meta(T, dtype=torch.int64)
        triton_rotary.rotate_and_store(qkv_TX, angles, angles, cache, cache, slots_T)
        triton_gate.gate(meta(T, D), meta(GROK1.num_experts, D, dtype=wide), 2, 30.0, True)
    assert [kernel.name for kernel in launches] == ["norm_kernel", "rotate_and_store_kernel", "gate_kernel"]
    for kernel in launches:
        assert_fits(SM_90, kernel)
