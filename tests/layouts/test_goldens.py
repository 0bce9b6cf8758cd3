"""The goldens come out of every layout, bit by bit where the layout holds every bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grokmoe.checkpoint import Checkpoint
from grokmoe.reference import Reference, reference_logits
from tests import goldens
from tests.layouts import writers

EXACT = 1e-4
QUANTISED = 0.05
"""What 8 bits cost at most: relative RMS of a position's logits, the median over the positions of SHORT (0.02 to 0.04).
In longer prompts a token with two nearly equal experts takes the other one, and moves those after it."""
PROMPT, SHORT = goldens.PROMPTS["len33"], goldens.PROMPTS["len7"]


def median_error(logits: torch.Tensor, golden: torch.Tensor) -> float:
    error = (logits - golden).square().mean(-1).sqrt() / golden.square().mean(-1).sqrt()
    return float(error.median())


@pytest.fixture(scope="module")
def expected() -> writers.Tensors:
    return writers.tensors_of(writers.TINY_A)


@pytest.mark.parametrize("layout", writers.WRITERS)
def test_every_bit_and_the_golden_logits(tmp_path: Path, expected: writers.Tensors, layout: str) -> None:
    writers.WRITERS[layout](writers.TINY_A, tmp_path / "model")
    with Checkpoint.open(tmp_path / "model") as checkpoint:
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.read(name, torch.float32), tensor.float()), name
        logits = reference_logits(checkpoint, PROMPT)
    assert float((logits - goldens.logits("seed", "len33")).abs().max()) <= EXACT


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_xai_integers_mean_what_was_written(tmp_path: Path, scales: torch.dtype, groups: int) -> None:
    meant = writers.jax_release(writers.TINY_A, tmp_path / "model", scales, groups=groups)
    with Checkpoint.open(tmp_path / "model", "xai") as checkpoint:
        read = {name: checkpoint.read(name) for name in checkpoint.tensors}
        logits = reference_logits(checkpoint, SHORT)
    assert read.keys() == meant.keys()
    for name, tensor in meant.items():
        assert read[name].dtype is tensor.dtype
        assert torch.equal(read[name], tensor), name
    same = Reference(goldens.config("xai"), meant).logits(SHORT)
    assert torch.equal(logits, same)
    assert 1e-3 < median_error(logits, goldens.logits("xai", "len7")) < QUANTISED


def test_gguf_blocks_lose_what_eight_bits_lose(tmp_path: Path, expected: writers.Tensors) -> None:
    pytest.importorskip("gguf")
    writers.gguf(writers.TINY_A, tmp_path / "model", "q8_0")
    with Checkpoint.open(tmp_path / "model") as checkpoint:
        for name, tensor in expected.items():
            read, wanted = checkpoint.read(name), tensor.float()
            assert read.dtype is torch.float32
            if "norm" in name or "gate.weight" in name:
                assert torch.equal(read, wanted)
                continue
            # A block of 32 has one scale, in float16: the largest value / 127. Rounding loses half a step.
            blocks = wanted.unflatten(-1, (-1, 32))
            half_a_step = blocks.abs().amax(-1, keepdim=True) / 127 / 2
            assert ((read.unflatten(-1, (-1, 32)) - blocks).abs() <= 1.2 * half_a_step).all(), name
        logits = reference_logits(checkpoint, SHORT)
    assert 1e-3 < median_error(logits, goldens.logits("seed", "len7")) < QUANTISED
