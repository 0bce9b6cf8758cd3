"""Checkpoints in FP8: what is read of them, by whom, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from attention_worker.weights import load_weights
from expert_worker import weights
from expert_worker.experts import ExpertSet
from expert_worker.kernels import reference
from expert_worker.stacked_layers import StackedFp8Layer
from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.errors import CheckpointError
from grokmoe.reference import Reference
from tests import goldens
from tests.layouts.writers import Tensors, raw_config, save, tensors_of
from tests.topologies import Setup, fused, request, run, split

FORMS = ("tensor", "scalar", "channel", "channel column")


def quantised(tensors: Tensors, form: str = "channel", scale_dtype: torch.dtype = torch.float32) -> Tensors:
    """Every matrix but gates, embedding and head in eight bits, as llm-compressor or vLLM's tools write them."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if ".attn." not in name and names.expert_of(name) is None:
            found[name] = tensor
            continue
        if form.startswith("channel"):
            q, scale = reference.quantise_rows(tensor)
            scale = scale[:, None] if "column" in form else scale
        else:
            scale = (tensor.float().abs().max() / reference.LARGEST_E4M3).reshape(() if form == "scalar" else (1,))
        scale = scale.to(scale_dtype)
        if not form.startswith("channel") or scale_dtype != torch.float32:
            q = (tensor.float() / scale.float().reshape(-1, 1)).to(torch.float8_e4m3fn)
        found[name], found[f"{name}_scale"] = q, scale
        found[f"{name.removesuffix('.weight')}.input_scale"] = torch.tensor(0.25)
    return found


def dequantised(tensors: Tensors) -> Tensors:
    """What the numbers in it mean, in float32."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale"):
            continue
        scale = tensors.get(f"{name}_scale")
        found[name] = tensor.float() if scale is None else tensor.float() * scale.float().reshape(-1, 1)
    return found


def written(folder: Path, tensors: Tensors) -> Path:
    save(folder / "model", raw_config(goldens.DIRECTORY), tensors)
    return folder / "model"


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_is_number_times_scale(tmp_path: Path, form: str, scale_dtype: torch.dtype) -> None:
    tensors = quantised(tensors_of(goldens.DIRECTORY), form, scale_dtype)
    expected = dequantised(tensors)
    with Checkpoint.open(written(tmp_path, tensors)) as checkpoint:
        for name in checkpoint.tensors:
            assert torch.equal(checkpoint.read(name, torch.float32), expected[name]), name
        name = names.expert(1, 3, "linear_1")
        assert checkpoint.is_in_8_bits(name)
        assert not checkpoint.is_in_8_bits(names.gate(1))
        part = checkpoint.read(name, torch.float32, slice(5, 9), slice(3, 20))
        assert torch.equal(part, expected[name][5:9, 3:20])
        pieces = list(checkpoint.pieces_in_8_bits(name, 100, slice(5, 9), slice(3, 20)))
        assert len(pieces) == 1
        assert [place for place, _, _ in checkpoint.pieces_in_8_bits(name, 40, slice(5, 9), slice(3, 20))] == [
            slice(0, 2), slice(2, 4)
        ]  # fmt: skip
        _, q, scale = pieces[0]
        assert q.dtype == torch.float8_e4m3fn
        assert torch.equal(q.float() * scale[:, None], expected[name][5:9, 3:20])


def test_in_shards(tmp_path: Path) -> None:
    """A matrix in one file and its scale in another."""
    tensors = quantised(tensors_of(goldens.DIRECTORY))
    scales = {name for name in tensors if name.endswith("scale") and "norm" not in name}
    folder = tmp_path / "model"
    folder.mkdir()
    index = {}
    for file, chosen in (("a.safetensors", set(tensors) - scales), ("b.safetensors", scales)):
        save_file({name: tensors[name].contiguous() for name in sorted(chosen)}, folder / file)
        index |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(raw_config(goldens.DIRECTORY)))
    expected = dequantised(tensors)
    with Checkpoint.open(folder) as checkpoint:
        for name in checkpoint.tensors:
            assert torch.equal(checkpoint.read(name, torch.float32), expected[name]), name


@pytest.mark.parametrize("form", ["tensor", "channel"])
@pytest.mark.parametrize("expert_dtype", ["same", "fp8_e4m3"])
@pytest.mark.parametrize("topology", [fused, split])
def test_logits_are_those_of_its_numbers(tmp_path: Path, topology: Any, expert_dtype: str, form: str) -> None:
    """Attention and experts, dequantised or multiplied as they are."""
    tensors = quantised(tensors_of(goldens.DIRECTORY), form)
    oracle = Reference(goldens.config(), dequantised(tensors))
    setup = Setup(written(tmp_path, tensors), expert_dtype=expert_dtype)

    async def go() -> None:
        async with topology(setup) as engine:
            ids = goldens.PROMPTS["len7"]
            tokens, logits = await run(engine, request(ids, 4, logits=True))
            expected = oracle.logits([*ids, *tokens[:-1]])
            assert logits is not None
            assert (logits - expected).abs().max() < 1e-4

    asyncio.run(go())


def test_a_worker_takes_them_as_they_are(tmp_path: Path) -> None:
    """Bit for bit what is in the file, slices of experts too; nothing is quantised again."""
    tensors = quantised(tensors_of(goldens.DIRECTORY), "tensor")
    with Checkpoint.open(written(tmp_path, tensors)) as checkpoint:
        experts = ExpertSet(checkpoint.config, {2: (5,)}, torch.bfloat16, torch.device("cpu"))
        stacked = StackedFp8Layer(
            checkpoint.config, torch.bfloat16, torch.device("cpu"), reference.expert_mlp, reference.quantise_rows, False
        )
        experts.replace(2, stacked)
        weights.load_layer(experts, checkpoint, 2, (5,))
    layer = experts.layers[2]
    assert isinstance(layer, StackedFp8Layer)
    for linear, stack in layer._stacks.items():
        name = names.expert(2, 5, linear)
        assert torch.equal(stack[0].view(torch.uint8), tensors[name].view(torch.uint8))
        assert torch.equal(layer._scales[linear][0], tensors[f"{name}_scale"].expand(len(tensors[name])))


def test_attention_is_dequantised(tmp_path: Path) -> None:
    tensors = quantised(tensors_of(goldens.DIRECTORY))
    with Checkpoint.open(written(tmp_path, tensors)) as checkpoint:
        loaded = load_weights(checkpoint, torch.float32, torch.device("cpu"))
    expected = dequantised(tensors)[names.attention(0, "o_proj")]
    eye = torch.eye(expected.shape[1])
    torch.testing.assert_close(loaded.layers[0].o_proj(eye).T, expected, rtol=1e-6, atol=1e-7)


NAME = names.expert(0, 0, "linear")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{NAME}_scale": None}, f"tensor {NAME}_scale in .*expected one float, or one for each of 128 outputs, found "
                                  f"none, and {NAME} is F8_E4M3"),
        ({f"{NAME}_scale": torch.ones(64)}, r"found F32 \[64\]"),
        ({f"{NAME}_scale": torch.ones(1, 192)}, r"found F32 \[1, 192\]"),
        ({f"{NAME}_scale": torch.ones(2, 64)}, r"found F32 \[2, 64\]"),
        ({f"{NAME}_scale": torch.ones(128, dtype=torch.int32)}, r"found I32 \[128\]"),
        ({f"{NAME}_scale_inv": torch.ones(1, 2)}, "expected no tensor of this name"),
        ({NAME: torch.zeros(128, 192), NAME.replace("weight", "input_scale"): None},
         f"tensor {NAME}_scale .*expected no tensor of this name"),
        ({NAME: torch.zeros(128, 192).to(torch.float8_e5m2), f"{NAME}_scale": None,
          NAME.replace("weight", "input_scale"): None}, "expected dtype F32 or BF16 or F16, found F8_E5M2"),
        ({NAME: torch.zeros(64, 192).to(torch.float8_e4m3fn), f"{NAME}_scale": torch.ones(1)},
         r"expected shape \[128, 192\]"),
    ],
    ids=["no scale", "too few", "of inputs", "of blocks", "of integers", "inverse", "scale without", "e5m2", "shape"],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, change: dict[str, torch.Tensor | None], words: str) -> None:
    tensors: dict[str, Any] = quantised(tensors_of(goldens.DIRECTORY)) | change
    folder = written(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(folder)


def test_inspect_says_it(tmp_path: Path) -> None:
    from grokmoe.checkpoint_summary import summary

    folder = written(tmp_path, quantised(tensors_of(goldens.DIRECTORY)))
    with Checkpoint.open(folder) as checkpoint:
        told = json.dumps(dataclasses.asdict(summary(checkpoint)), default=str)
    assert "F8_E4M3" in told
