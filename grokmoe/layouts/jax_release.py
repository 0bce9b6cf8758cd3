"""xAI's own release of Grok-1: a folder of pickled arrays, most of them 8-bit integers with scales.

`tensor00042_000` is the 42nd leaf of the parameters' tree. JAX orders a tree by its keys as text, so layer 10 comes
before layer 2. Matrices are [in, out], experts stacked [E, in, out]; a scale holds for one output and a group of
inputs: all of them, or an eighth where the matrix was cut along its inputs over 8 devices. A weight is integer times
scale, in the type of the scales, as xai-org/grok-1 (`model.py`, `checkpoint.py`) multiplies.

Letters: I inputs, O outputs, G groups of inputs, R rows (outputs) and C columns (inputs) that are asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grokmoe import tensor_names as names
from grokmoe.checkpoint_part import Needs
from grokmoe.errors import CheckpointError
from grokmoe.layouts.layout import Contents
from grokmoe.layouts.mapped_file import MappedFile, file_error, tensor_error
from grokmoe.layouts.pickled_arrays import ArrayBytes, read_pickle
from grokmoe.layouts.source import TORCH_DTYPES, Source, StoredRows
from grokmoe.model_config import GROK1, ModelConfig

FOLDER = "ckpt-0"
"""Where the files are in a copy of the release; a directory that has them itself will do as well."""

IN_LAYER: dict[str, str] = {
    "moe/linear": "linear",
    "moe/linear_1": "linear_1",
    "moe/linear_v": "linear_v",
    "multi_head_attention/key": "k_proj",
    "multi_head_attention/linear": "o_proj",
    "multi_head_attention/query": "q_proj",
    "multi_head_attention/value": "v_proj",
    "rms_norm": "pre_attn_norm",
    "rms_norm_1": "post_attn_norm",
    "rms_norm_2": "pre_moe_norm",
    "rms_norm_3": "post_moe_norm",
    "router": "gate",
}
"""A layer's part of the tree -> what it is here, in the tree's order."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One file's tensor. path: in the tree. names: canonical; of an expert's matrix, all experts in order."""

    path: str
    names: tuple[str, ...]
    is_matrix: bool


def leaves(config: ModelConfig) -> Iterator[Leaf]:
    """All of them in the order of the files. The release has a tied head and no other."""
    yield Leaf("language_model/in_out_embed", (names.embed(),), False)
    yield Leaf("language_model/rms_norm", (names.final_norm(),), False)
    for layer in sorted(range(config.num_layers), key=str):
        for path, what in IN_LAYER.items():
            yield Leaf(f"transformer/decoder_layer_{layer}/{path}", _names(config, layer, what), "rms" not in path)


def _names(config: ModelConfig, layer: int, what: str) -> tuple[str, ...]:
    for linear in names.EXPERT_LINEARS:
        if what == linear:
            return tuple(names.expert(layer, expert, linear) for expert in range(config.num_experts))
    for projection in names.PROJECTIONS:
        if what == projection:
            return (names.attention(layer, projection),)
    return next(((names.norm(layer, norm),) for norm in names.NORMS if what == norm), (names.gate(layer),))


@dataclasses.dataclass(frozen=True)
class JaxRelease:
    """The files in a folder."""

    folder: Path

    @classmethod
    def find(cls, directory: Path) -> JaxRelease | None:
        """The layout, if it is that of the directory."""
        folders = (directory, directory / FOLDER)
        return next((cls(folder) for folder in folders if next(folder.glob("tensor[0-9]*_000"), None)), None)

    def config(self) -> Mapping[str, Any]:
        """The released model's: the release's own is a Python program (`run.py`)."""
        return GROK1.to_dict()

    def contents(self, config: ModelConfig, needs: Needs) -> Contents:
        """See Layout."""
        if not config.tie_word_embeddings:
            raise file_error(self.folder, "a tied head, the only one this layout has", "tie_word_embeddings is false")
        sources: dict[str, Source] = {}
        files = []
        expected = list(leaves(config))
        for number, leaf in enumerate(expected):
            path = self.folder / f"tensor{number:05}_000"
            if path.exists():
                sources |= _sources(leaf, path, config)
                files.append(path)
            elif any(map(needs, leaf.names)):
                raise tensor_error(leaf.path, path, "this file of the release", "no such file")
        surplus = self.folder / f"tensor{len(expected):05}_000"
        if surplus.exists():
            raise file_error(surplus, f"{len(expected)} files because num_hidden_layers is {config.num_layers}", "more")
        known = frozenset(name for leaf in expected for name in leaf.names)
        return Contents(sources, known, tuple(files), "xai-org/grok-1's JAX arrays")


def _sources(leaf: Leaf, path: Path, config: ModelConfig) -> dict[str, Source]:
    """The tensors of one file."""
    try:
        with path.open("rb") as file:
            mapped = MappedFile.of(path, file.fileno())
            pickled = read_pickle(file, mapped)
    except OSError as error:
        raise file_error(path, f"the array of {leaf.path}", error.strerror) from error
    weight, scales = pickled.weight, pickled.scales
    if not leaf.is_matrix and scales is None:
        name = leaf.names[0]
        return {name: StoredRows(leaf.path, path, weight.dtype, weight.shape, weight.num_bytes, mapped, weight.begin)}
    _check(leaf, path, weight, scales, config)
    num_experts = len(leaf.names)
    sources: dict[str, Source] = {}
    for index, name in enumerate(leaf.names):
        sources[name] = TransposedRows(
            leaf.path if num_experts == 1 else f"{leaf.path}[{index}]",
            path,
            weight.dtype if scales is None else f"{weight.dtype} x {scales.dtype}",
            (weight.shape[-1], weight.shape[-2]),
            (weight.num_bytes + (scales.num_bytes if scales else 0)) // num_experts,
            mapped,
            _one_of(weight, index, num_experts),
            None if scales is None else _one_of(scales, index, num_experts),
        )
    return sources


def _check(leaf: Leaf, path: Path, weight: ArrayBytes, scales: ArrayBytes | None, config: ModelConfig) -> None:
    """Shapes and types that can be a matrix of this leaf. Whether the model's sizes fit is seen later."""

    def wrong(expected: str, found: object) -> CheckpointError:
        return tensor_error(leaf.path, path, expected, found)

    stack = (len(leaf.names),) if "/moe/" in leaf.path else ()
    if not leaf.is_matrix:
        raise wrong("an array without scales", "scales")
    if weight.shape[:-2] != stack or len(weight.shape) != len(stack) + 2:
        shape = "[num_experts, in, out]" if stack else "[in, out]"
        raise wrong(f"shape {shape}, num_experts being {config.num_experts}", f"shape {list(weight.shape)}")
    if scales is None:
        if weight.dtype not in TORCH_DTYPES:
            raise wrong("scales beside integers", "none")
        return
    if weight.dtype != "I8" or scales.dtype not in TORCH_DTYPES:
        raise wrong("8-bit integers and scales of a float type", f"{weight.dtype} and {scales.dtype}")
    groups = scales.shape[-2] if len(scales.shape) == len(weight.shape) else 0
    if (*stack, groups, weight.shape[-1]) != scales.shape or not groups or weight.shape[-2] % groups:
        raise wrong(f"scales that cut {list(weight.shape)} into groups of inputs", f"shape {list(scales.shape)}")


def _one_of(array: ArrayBytes, index: int, number: int) -> ArrayBytes:
    """One matrix of a stack of `number`, or the matrix itself."""
    size = array.num_bytes // number
    return ArrayBytes(array.dtype, array.shape[-2:], array.begin + index * size, size)


@dataclasses.dataclass(frozen=True)
class TransposedRows(Source):
    """A matrix stored as [I, O], with scales [G, O] if it is quantised."""

    file: MappedFile
    weight: ArrayBytes
    scales: ArrayBytes | None

    rows_at_once = 128
    """The mapping is by pages, and a row of ours is a column there."""

    @property
    def values(self) -> torch.dtype:
        """Of the scales, or of the stored weight."""
        return TORCH_DTYPES[(self.scales or self.weight).dtype]

    def rows(self, first: int, stop: int, columns: slice | None = None) -> torch.Tensor:
        """See Source. columns: of inputs, which are rows of what is stored."""
        inputs = columns or slice(0, self.shape[1])
        weight_RC = self._turned(self.weight, inputs, first, stop)
        if self.scales is None:
            return weight_RC
        out_RC = weight_RC.to(self.values)
        groups, size = self.scales.shape[0], self.shape[1] // self.scales.shape[0]
        scales_RG = self._turned(self.scales, slice(0, groups), first, stop)
        for group in range(groups):
            begin, end = (max(0, edge * size - inputs.start) for edge in (group, group + 1))
            out_RC[:, begin:end].mul_(scales_RG[:, group, None])
        return out_RC

    def _turned(self, array: ArrayBytes, inputs: slice, first: int, stop: int) -> torch.Tensor:
        """Outputs [first, stop) of some inputs, outputs first."""
        row_bytes = array.num_bytes // array.shape[0]
        begin, end = (array.begin + index * row_bytes for index in (inputs.start, inputs.stop))
        stored = self.file.map(begin, end, self.stored_name)
        item = {"I8": np.int8, "F32": np.float32, "F16": np.float16, "BF16": np.int16}[array.dtype]
        matrix_IO = stored.view(item).reshape(inputs.stop - inputs.start, array.shape[1])
        tensor = torch.from_numpy(matrix_IO[:, first:stop].T.copy(order="C"))
        return tensor.view(torch.bfloat16) if array.dtype == "BF16" else tensor
