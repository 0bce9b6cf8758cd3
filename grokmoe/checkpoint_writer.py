"""Writes checkpoints in the layout `grokmoe.checkpoint` reads: tensors given, or random ones for tests."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from grokmoe import tensor_names as names
from grokmoe.checkpoint import INDEX_FILE, SINGLE_FILE
from grokmoe.errors import CheckpointError
from grokmoe.model_config import ModelConfig


def write_checkpoint(
    directory: str | Path,
    config_dict: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    max_shard_bytes: int | None = None,
) -> None:
    """Writes config.json and the tensors under the names given, unchecked.

    directory: made if absent; CheckpointError when it already holds a checkpoint.
    max_shard_bytes: begin a new file before exceeding this (one tensor may); None writes a single file.
    """
    sizes = {name: tensor.numel() * tensor.itemsize for name, tensor in tensors.items()}
    _write(Path(directory), config_dict, sizes, tensors.__getitem__, max_shard_bytes)


def random_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    *,
    max_shard_bytes: int | None = None,
    variant: str = "vllm",
) -> None:
    """Writes a random model; each tensor is a function of seed, name and shape alone.

    Holds one file's tensors at a time. variant: the form `config` has, see ModelConfig.to_dict.
    """
    specs = {spec.name: spec for spec in names.expected(config)}
    sizes = {name: math.prod(spec.shape) * dtype.itemsize for name, spec in specs.items()}

    def make(name: str) -> torch.Tensor:
        return random_tensor(specs[name], seed).to(dtype)

    raw = config.to_dict(variant) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    _write(Path(directory), raw, sizes, make, max_shard_bytes)


def random_tensor(spec: names.TensorSpec, seed: int) -> torch.Tensor:
    """One tensor of a random model, float32; drawn by numpy, whose streams do not depend on the CPU's vector width.

    Matrices keep the size of what they multiply. The final gain is large, so that logits lie far enough apart for
    greedy tokens to survive rounding.
    """
    digest = hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()
    drawn = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little"))).standard_normal(
        spec.shape, dtype=np.float32
    )
    tensor = torch.from_numpy(drawn)
    if spec.part == "norms":
        return (4.0 if spec.name == names.final_norm() else 1.0) * (1.0 + 0.1 * tensor)
    return tensor.mul_(spec.shape[-1] ** -0.5)


def _write(
    directory: Path,
    config_dict: Mapping[str, Any],
    sizes: Mapping[str, int],
    get: Callable[[str], torch.Tensor],
    max_shard_bytes: int | None,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if any((directory / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        raise CheckpointError(f"{directory}: already holds a checkpoint")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if max_shard_bytes is not None and shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors" if max_shard_bytes else SINGLE_FILE
        tensors = {name: get(name).detach().cpu().contiguous() for name in shard}
        save_file(tensors, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    if max_shard_bytes:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(dict(config_dict), indent=2) + "\n")
