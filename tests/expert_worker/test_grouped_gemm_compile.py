"""What the expert MLP kernels compile to at Grok-1's size: they fit the device and use its matrix units.

No GPU is needed. Values are tested in test_grouped_gemm.py; speed and races need the real thing.
Shapes: N rows, E experts held, D hidden, F ffn.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch

from expert_worker.kernels.grouped_gemm import expert_mlp
from expert_worker.kernels.reference import ChannelScales
from grokmoe.model_config import GROK1, Gelu
from tests.triton_compile import GFX_942, SM_80, SM_90, SM_100, Compiled, GPUTarget, assert_fits, compiling

D, F, E = GROK1.hidden_size, GROK1.intermediate_size, GROK1.num_experts


def compile_at_full_size(
    target: GPUTarget,
    counts_E: list[int],
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    rows_in_8_bits: bool = False,
) -> list[Compiled]:
    """All launches of one call, which all fit."""

    def meta(*shape: int, dtype: torch.dtype = weight_dtype or dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    scales = ChannelScales(*(meta(E, size, dtype=torch.float32) for size in (F, F, D))) if weight_dtype else None
    rows = meta(sum(counts_E), D, dtype=dtype)
    with compiling(target) as launches:
        weights = (meta(E, F, D), meta(E, F, D), meta(E, D, F))
        expert_mlp(rows, counts_E, *weights, Gelu.ERF, scales=scales, rows_in_8_bits=rows_in_8_bits)
    for kernel in launches:
        assert_fits(target, kernel)
    return launches


@pytest.mark.parametrize(
    ("target", "rows", "matrix_unit"),
    [
        (SM_80, 16, "HMMA"),
        (SM_80, 128, "HMMA"),
        (SM_90, 16, "HGMMA"),
        (SM_90, 128, "HGMMA"),
        (SM_100, 16, "UTCHMMA"),
        (GFX_942, 128, "v_mfma"),
    ],
    ids=lambda value: str(getattr(value, "arch", value)),
)
def test_bf16(target: GPUTarget, rows: int, matrix_unit: str) -> None:
    """The largest products each has, for few rows too, and loads that run ahead: through the copy engine where there
    is one."""
    for kernel in compile_at_full_size(target, [rows] * E):
        assert kernel.count(matrix_unit), kernel.opcodes
        assert (kernel.count("UTMALDG") > 0) == (target in (SM_90, SM_100)), kernel.opcodes
        if target is SM_80:
            asynchronous = [opcode for opcode in kernel.opcodes if opcode.startswith("LDGSTS")]
            assert asynchronous == ["LDGSTS.E.BYPASS.128"], f"{kernel.name} loads by {kernel.opcodes}"


def test_fp32() -> None:
    for kernel in compile_at_full_size(SM_80, [16] * E, torch.float32):
        # Plain float32 arithmetic: tensor cores would round the operands to TF32.
        assert kernel.count("FFMA"), kernel.opcodes
        assert kernel.count("HMMA", "HGMMA") == 0, kernel.opcodes


@pytest.mark.parametrize(("target", "matrix_unit"), [(SM_80, "HMMA"), (SM_90, "HGMMA")], ids=["80", "90"])
def test_weights_in_eight_bits(target: GPUTarget, matrix_unit: str) -> None:
    """Widened in the kernel, also where the device does not know the type."""
    for kernel in compile_at_full_size(target, [16] * E, weight_dtype=torch.float8_e4m3fn):
        assert kernel.count(matrix_unit), kernel.opcodes


def test_rows_and_weights_in_eight_bits() -> None:
    launches = compile_at_full_size(SM_90, [128] * E, weight_dtype=torch.float8_e4m3fn, rows_in_8_bits=True)
    quantise, gate_up, again, down = launches
    assert quantise.name == again.name == "quantise_rows_kernel"
    for kernel in (gate_up, down):
        assert kernel.count("QGMMA"), kernel.opcodes


def test_programs_are_as_many_as_the_chip_holds() -> None:
    """At most so many per multiprocessor, of which a device that is not there has one."""
    for kernel in compile_at_full_size(SM_80, [5, 0, 0, 0, 0, 0, 0, 16]):
        assert kernel.grid == (2,)
