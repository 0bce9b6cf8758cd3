"""Checkpoints in every layout but ours, made from one of ours. Nothing of xAI's, of JAX or of llama.cpp is needed."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.peers import gguf_model
from grokmoe.checkpoint import Checkpoint
from grokmoe.layouts.jax_release import leaves
from tests import goldens

Tensors = dict[str, torch.Tensor]


def tensors_of(directory: Path) -> Tensors:
    """All tensors as they are stored."""
    with Checkpoint.open(directory) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def raw_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def save(target: Path, config: dict[str, Any], tensors: Tensors) -> None:
    """A checkpoint of ours, or of others whose names these are."""
    target.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config))


# --- names

SGLANG = [
    (r"\.attn\.", ".self_attn."),
    (r"moe_block\.gate", "block_sparse_moe.gate"),
    (r"moe_block\.experts\.(\d+)\.linear\.", r"block_sparse_moe.experts.\1.w1."),
    (r"moe_block\.experts\.(\d+)\.linear_v\.", r"block_sparse_moe.experts.\1.w3."),
    (r"moe_block\.experts\.(\d+)\.linear_1\.", r"block_sparse_moe.experts.\1.w2."),
    (r"norm\.scale", "norm.weight"),
]
KEYFAN = [
    (r"model\.layers\.(\d+)\.", r"transformer.decoder_layer.\1."),
    (r"attn\.q_proj", "multi_head_attention.query"),
    (r"attn\.k_proj", "multi_head_attention.key"),
    (r"attn\.v_proj", "multi_head_attention.value"),
    (r"attn\.o_proj", "multi_head_attention.linear"),
    (r"moe_block\.gate", "router"),
    (r"moe_block\.experts", "moe"),
    (r"pre_attn_norm\.scale", "rms_norm.weight"),
    (r"post_attn_norm\.scale", "rms_norm_1.weight"),
    (r"pre_moe_norm\.scale", "rms_norm_2.weight"),
    (r"post_moe_norm\.scale", "rms_norm_3.weight"),
    (r"model\.norm\.scale", "transformer.rms_norm.weight"),
    (r"model\.embed_tokens", "transformer.in_out_embed"),
]


def respelled(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def with_names(source: Path, target: Path, rules: list[tuple[str, str]], **changes: Any) -> None:
    """The same tensors under other names. changes: of config.json."""
    respelt = {respelled(name, rules): tensor for name, tensor in tensors_of(source).items()}
    save(target, raw_config(source) | changes, respelt)


def tensor_parallel(source: Path, target: Path, num_ranks: int) -> None:
    """As Grok-2 is published: experts cut over the ranks, everything else in a file of its own."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    common: Tensors = {}
    ranks: list[Tensors] = [{} for _ in range(num_ranks)]
    for name, tensor in tensors_of(source).items():
        other = respelled(name, SGLANG)
        if ".experts." not in name:
            common[other] = tensor
            continue
        parts = tensor.chunk(num_ranks, dim=1 if ".w2." in other else 0)
        for rank, part in zip(ranks, parts, strict=True):
            rank[other] = part.contiguous()
    save_file(common, target / "pytorch_model-00000-TP-common.safetensors")
    for number, tensors in enumerate(ranks):
        # Two files a rank, as there are many in the release.
        for half in (0, 1):
            mine = {name: tensors[name] for name in list(tensors)[half::2]}
            save_file(mine, target / f"pytorch_model-{half + 1:05}-TP-{number:03}.safetensors")


# --- xAI's arrays


@dataclasses.dataclass
class QuantizedWeight8bit:
    weight: Any
    scales: Any


QuantizedWeight8bit.__module__ = "__main__"
"""Where xAI's program defines it; pickle writes down nothing else."""


def pickled(value: Any, protocol: int = 4) -> bytes:
    """As xAI's program writes a file."""
    main = sys.modules["__main__"]
    main.QuantizedWeight8bit = QuantizedWeight8bit  # type: ignore[attr-defined]
    try:
        return pickle.dumps(value, protocol)
    finally:
        del main.QuantizedWeight8bit  # type: ignore[attr-defined]


def quantised(weight: torch.Tensor, groups: int, scales: torch.dtype) -> tuple[QuantizedWeight8bit, torch.Tensor]:
    """[..., in, out] as integers with scales [..., groups, out]; and what it means, in the type of the scales."""
    grouped = weight.float().unflatten(-2, (groups, -1))
    step = (grouped.abs().amax(-2, keepdim=True) / 127).clamp_min(1e-8).to(scales)
    integers = (grouped / step.float()).round().clamp(-127, 127)
    meant = (integers * step.float()).to(scales).flatten(-3, -2)
    as_numpy = step.squeeze(-2)
    numbers = (
        as_numpy.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if scales is torch.bfloat16 else as_numpy.numpy()
    )
    return QuantizedWeight8bit(integers.flatten(-3, -2).to(torch.int8).numpy(), numbers), meant


def jax_release(
    source: Path, target: Path, scales: torch.dtype | None = torch.bfloat16, folder: str = "ckpt-0", groups: int = 4
) -> Tensors:
    """xAI's files.

    scales: their type; None writes plain float32 arrays. groups: of the inputs of matrices that were cut along them.
    Returns what the files mean, under our names.
    """
    files = target / folder
    files.mkdir(parents=True)
    shutil.copy(source / "config.json", target)
    ours = tensors_of(source)
    meant: Tensors = {}
    with Checkpoint.open(source) as checkpoint:
        expected = list(leaves(checkpoint.config))
    for number, leaf in enumerate(expected):
        stacked = torch.stack([ours[name].float() for name in leaf.names])
        value: Any = (stacked if "/moe/" in leaf.path else stacked[0]).numpy()
        if leaf.is_matrix:
            value = np.ascontiguousarray(value.swapaxes(-1, -2))
            if scales is not None and "router" not in leaf.path:
                is_cut = leaf.path.endswith(("linear_1", "attention/linear"))
                value, exact = quantised(torch.from_numpy(value), groups if is_cut else 1, scales)
                stacked = (exact if "/moe/" in leaf.path else exact[None]).transpose(-1, -2).contiguous()
        meant |= dict(zip(leaf.names, stacked, strict=True))
        (files / f"tensor{number:05}_000").write_bytes(pickled(value))
    return meant


# --- all of them


def gguf(source: Path, target: Path, kind: str) -> None:
    """One file, without a config.json."""
    target.mkdir()
    gguf_model.convert(source, kind, target)


WRITERS: Mapping[str, Callable[[Path, Path], object]] = {
    "sglang": lambda source, target: with_names(source, target, SGLANG),
    "keyfan": lambda source, target: with_names(source, target, KEYFAN),
    "tensor-parallel": lambda source, target: tensor_parallel(source, target, 4),
    "jax": lambda source, target: jax_release(source, target, None),
    "gguf-f32": lambda source, target: gguf(source, target, "f32"),
    "gguf-bf16": lambda source, target: gguf(source, target, "bf16"),
}
"""Layouts that hold every value of the goldens' checkpoint, which is bfloat16."""

TINY_A = goldens.DIRECTORY
