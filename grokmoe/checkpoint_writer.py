"""Writes checkpoints in safetensors under our names: tensors given, or random ones for tests and benchmarks.

A file of tensors is written piece by piece, so that a model of any size needs little memory. `config.json` comes last:
a directory that has it is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grokmoe import tensor_names as names
from grokmoe.errors import CheckpointError
from grokmoe.layouts.safetensors_files import INDEX_FILE, SINGLE_FILE
from grokmoe.model_config import ModelConfig
from grokmoe.safetensors_file import Entry, write_tensors
from grokmoe.shard_plan import by_size

DRAWN_AT_ONCE = 1 << 22
"""Elements of a random tensor that are in memory at a time; the rows of one piece may be more."""


def write_checkpoint(
    directory: str | Path,
    config_dict: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    max_shard_bytes: int | None = None,
) -> None:
    """Writes config.json and the tensors under the names given, unchecked.

    directory: made if absent; CheckpointError when it already holds a checkpoint, or part of one.
    max_shard_bytes: begin a new file before exceeding this (one tensor may); None writes a single file.
    """

    def entry(tensor: torch.Tensor) -> Entry:
        return Entry(tensor.dtype, tuple(tensor.shape), lambda: (tensor,))

    _write(Path(directory), config_dict, {name: entry(each) for name, each in tensors.items()}, max_shard_bytes)


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

    directory, max_shard_bytes: as for `write_checkpoint`. variant: the form `config` has, see ModelConfig.to_dict.
    """

    def entry(spec: names.TensorSpec) -> Entry:
        return Entry(dtype, spec.shape, lambda: (piece.to(dtype) for piece in random_rows(spec, seed)))

    raw = config.to_dict(variant) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    entries = {spec.name: entry(spec) for spec in names.expected(config)}
    _write(Path(directory), raw, entries, max_shard_bytes)


def random_rows(spec: names.TensorSpec, seed: int, drawn_at_once: int = DRAWN_AT_ONCE) -> Iterator[torch.Tensor]:
    """One tensor of a random model, float32, in pieces of whole rows; how long the pieces are changes no value.

    Drawn by numpy, whose streams do not depend on the CPU's vector width. Matrices keep the size of what they
    multiply. The final gain is large, so that logits lie far enough apart for greedy tokens to survive rounding.
    """
    digest = hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    num_rows, *row_shape = spec.shape
    step = max(1, drawn_at_once // math.prod(row_shape))
    for begin in range(0, num_rows, step):
        shape = (min(step, num_rows - begin), *row_shape)
        tensor = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
        if spec.part == "norms":
            yield (4.0 if spec.name == names.final_norm() else 1.0) * (1.0 + 0.1 * tensor)
        else:
            yield tensor.mul_(spec.shape[-1] ** -0.5)


def _write(
    directory: Path, config_dict: Mapping[str, Any], entries: Mapping[str, Entry], max_shard_bytes: int | None
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _check_empty(directory)
    sizes = {name: entry.num_bytes for name, entry in entries.items()}
    total, free = sum(sizes.values()), shutil.disk_usage(directory).free
    if total > free:
        raise CheckpointError(f"{directory}: needs {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    plan = by_size(sizes, max_shard_bytes) if max_shard_bytes else {SINGLE_FILE: list(entries)}
    for file, tensors in plan.items():
        write_tensors(directory / file, {name: entries[name] for name in tensors})
    if max_shard_bytes:
        weight_map = {name: file for file, tensors in plan.items() for name in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(dict(config_dict), indent=2) + "\n")


def _check_empty(directory: Path) -> None:
    config, index = directory / "config.json", directory / INDEX_FILE
    for path in (config, index, *sorted(directory.glob("*.safetensors*"))):
        if path.exists():
            raise CheckpointError(f"{directory}: already holds a checkpoint, or part of one: {path.name}")
