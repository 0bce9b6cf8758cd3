"""What the expert MLP kernels compile to at Grok-1's size: they fit the device and use its matrix units.

No GPU is needed. Values are tested in test_grouped_gemm.py; speed and races need the real thing.
Shapes: N rows, E experts held, D hidden, F ffn.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch

from expert_worker.kernels.grouped_gemm import TILE_CLASSES, TileClass, expert_mlp
from grokmoe.model_config import GROK1, Gelu
from tests.triton_compile import GFX_942, SHARED_LIMIT, SM_80, SM_90, SM_100, Compiled, GPUTarget, compiling

BF16_CLASSES = TILE_CLASSES[torch.bfloat16]
D, F = GROK1.hidden_size, GROK1.intermediate_size


def compile_at_full_size(
    target: GPUTarget, dtype: torch.dtype, counts_E: list[int], gelu: Gelu = Gelu.ERF
) -> tuple[Compiled, Compiled]:
    """Both launches of one call."""

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    E = len(counts_E)
    with compiling(target) as launches:
        expert_mlp(meta(sum(counts_E), D), counts_E, meta(E, F, D), meta(E, F, D), meta(E, D, F), gelu)
    gate_up, down = launches
    assert (gate_up.name, down.name) == ("gate_up_kernel", "down_kernel")
    return gate_up, down


def assert_fits(target: GPUTarget, kernel: Compiled) -> None:
    assert kernel.stack == 0, f"{kernel.name} spills {kernel.stack} bytes"
    assert kernel.count("LDL", "STL", "scratch_") == 0, f"{kernel.name} spills: {kernel.opcodes}"
    assert kernel.shared <= SHARED_LIMIT[target], f"{kernel.name} takes {kernel.shared} shared bytes"
    assert kernel.grid[1] <= 65535, f"grid {kernel.grid} exceeds the second axis' limit"


@pytest.mark.parametrize("target", [SM_80, SM_90, SM_100, GFX_942], ids=lambda target: str(target.arch))
@pytest.mark.parametrize("shape", BF16_CLASSES, ids=lambda shape: f"{shape.rows} rows")
def test_bf16(target: GPUTarget, shape: TileClass) -> None:
    for kernel in compile_at_full_size(target, torch.bfloat16, [shape.rows] * GROK1.num_experts):
        assert_fits(target, kernel)
        # wgmma and tcgen05 take 64 rows or more. Decode is bound by memory and can bear mma.sync.
        tall = {SM_80: "HMMA", SM_90: "HGMMA", SM_100: "UTCHMMA", GFX_942: "v_mfma"}[target]
        low = "v_mfma" if target is GFX_942 else "HMMA"
        assert kernel.count(tall if shape.rows >= 64 else low), kernel.opcodes
        if target is not GFX_942:
            asynchronous = [opcode for opcode in kernel.opcodes if opcode.startswith("LDGSTS")]
            assert asynchronous == ["LDGSTS.E.BYPASS.128"], f"{kernel.name} loads by {kernel.opcodes}"


@pytest.mark.parametrize("shape", TILE_CLASSES[torch.float32], ids=lambda shape: f"{shape.rows} rows")
def test_fp32(shape: TileClass) -> None:
    for kernel in compile_at_full_size(SM_80, torch.float32, [shape.rows] * GROK1.num_experts):
        assert_fits(SM_80, kernel)
        # Plain float32 arithmetic: tensor cores would round the operands to TF32.
        assert kernel.count("FFMA"), kernel.opcodes
        assert kernel.count("HMMA", "HGMMA") == 0, kernel.opcodes


def test_tanh() -> None:
    for kernel in compile_at_full_size(SM_90, torch.bfloat16, [128] * GROK1.num_experts, Gelu.TANH):
        assert_fits(SM_90, kernel)


@pytest.mark.parametrize(("counts_E", "num_tiles"), [([5, 0, 0, 0, 0, 0, 0, 16], 2), ([300], 3)], ids=str)
def test_grid_covers_the_output(counts_E: list[int], num_tiles: int) -> None:
    """Tiles of experts that have rows, times blocks of columns; one expert held as well as eight."""
    gate_up, down = compile_at_full_size(SM_90, torch.bfloat16, counts_E)
    shape = next((shape for shape in BF16_CLASSES if shape.rows >= max(counts_E)), BF16_CLASSES[-1])
    assert gate_up.grid == (num_tiles, F // shape.gate_up.columns)
    assert down.grid == (num_tiles, D // shape.down.columns)
