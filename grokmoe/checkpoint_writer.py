"""Writes checkpoints in safetensors under our names: tensors given, or random ones for tests and benchmarks.

A file of tensors is written piece by piece, so that a model of any size needs little memory. `config.json` comes last:
a directory that has it is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grokmoe import tensor_names as names
from grokmoe.errors import CheckpointError
from grokmoe.layouts.safetensors_files import INDEX_FILE, SINGLE_FILE
from grokmoe.layouts.source import TORCH_DTYPES
from grokmoe.model_config import ModelConfig

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

DRAWN_AT_ONCE = 1 << 22
"""Elements of a random tensor that are in memory at a time; the rows of one piece may be more."""

HEADER_ALIGNMENT = 8
"""The data of a safetensors file begins at a multiple of this."""


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What a header says of a tensor, and the tensor's rows in order, in pieces of any length."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


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

    def entry(tensor: torch.Tensor) -> _Entry:
        return _Entry(tensor.dtype, tuple(tensor.shape), lambda: (tensor,))

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

    def entry(spec: names.TensorSpec) -> _Entry:
        return _Entry(dtype, spec.shape, lambda: (piece.to(dtype) for piece in random_rows(spec, seed)))

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
    directory: Path, config_dict: Mapping[str, Any], entries: Mapping[str, _Entry], max_shard_bytes: int | None
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _check_empty(directory)
    total = sum(entry.num_bytes for entry in entries.values())
    free = shutil.disk_usage(directory).free
    if total > free:
        raise CheckpointError(f"{directory}: needs {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    shards = _shards(entries, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors" if max_shard_bytes else SINGLE_FILE
        _write_tensors(directory / file_name, {name: entries[name] for name in shard})
        weight_map |= dict.fromkeys(shard, file_name)
    if max_shard_bytes:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(dict(config_dict), indent=2) + "\n")


def _check_empty(directory: Path) -> None:
    config, index = directory / "config.json", directory / INDEX_FILE
    for path in (config, index, *sorted(directory.glob("*.safetensors*"))):
        if path.exists():
            raise CheckpointError(f"{directory}: already holds a checkpoint, or part of one: {path.name}")


def _shards(entries: Mapping[str, _Entry], max_shard_bytes: int | None) -> Sequence[Sequence[str]]:
    """The names of each file's tensors."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in entries.items():
        if max_shard_bytes is not None and shards[-1] and filled + entry.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += entry.num_bytes
    return shards


def _write_tensors(path: Path, entries: Mapping[str, _Entry]) -> None:
    """One safetensors file (the form: `grokmoe.layouts.safetensors_header`)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.num_bytes
        dtype = DTYPE_NAMES[entry.dtype]
        header[name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries.values():
            for piece in entry.pieces():
                file.write(piece.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
