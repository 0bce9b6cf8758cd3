"""A checkpoint on disk: a directory with config.json and safetensors, in one file or in shards with an index.

Opening reads and checks headers only; `read` maps exactly the bytes of one tensor, or of some of its rows, and
copies them out. So a role touches only its slice, and the host never holds more than one tensor beyond what a
caller keeps.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import torch

from grokmoe import tensor_names as names
from grokmoe.model_config import ModelConfig
from grokmoe.safetensors_header import (
    StoredTensor,
    file_error,
    object_without_duplicates,
    read_header,
    tensor_error,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

TORCH_DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The types a weight may be stored in."""


class Checkpoint:
    """An open checkpoint whose tensors are known to be exactly those its config asks for. A context manager.

    config: what config.json says, in the chosen variant. files: every safetensors file of the checkpoint.
    tensors: where each lies, by canonical name, in the order of the forward pass.
    """

    def __init__(
        self, directory: Path, config: ModelConfig, tensors: dict[str, StoredTensor], files: dict[Path, BinaryIO]
    ) -> None:
        """For `open`, which checks what it passes. Owns the open `files`."""
        self.directory = directory
        self.config = config
        self.tensors = tensors
        self.files = tuple(files)
        self._open_files = files

    @classmethod
    def open(cls, directory: str | Path, variant: str = "vllm") -> Checkpoint:
        """Reads config.json and the headers, and checks every name, shape and type.

        variant: as in ModelConfig.as_variant.
        Raises ConfigError for config.json, CheckpointError (tensor, file, expected, found) for anything else.
        """
        directory = Path(directory)
        config = ModelConfig.from_file(directory / "config.json", variant)
        with contextlib.ExitStack() as stack:
            index = _read_index(directory)
            files: dict[Path, BinaryIO] = {}
            for path in dict.fromkeys(index.values()) if index is not None else [directory / SINGLE_FILE]:
                try:
                    # Kept open: a file replaced meanwhile must not be read with the header of the old one.
                    files[path] = stack.enter_context(path.open("rb"))
                except OSError as error:
                    found = "no such file" if isinstance(error, FileNotFoundError) else str(error)
                    if index is None:
                        raise file_error(path, "a checkpoint", found) from error
                    name = next(name for name, target in index.items() if target == path)
                    raise tensor_error(name, path, f"the shard that {INDEX_FILE} names", found) from error
            stored = _collect(files, index)
            tensors = _match(stored, config, next(iter(files)))
            stack.pop_all()
        return cls(directory, config, tensors, files)

    def read(
        self, name: str, dtype: torch.dtype | None = None, rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor:
        """One tensor as memory of the caller's own.

        name: canonical (grokmoe.tensor_names). dtype: None keeps the stored one.
        rows: a range of the first dimension, without a step; only its bytes are mapped.
        columns: of a matrix, a range of the second; only the pages that its bytes lie on are read.
        Raises CheckpointError when the file is shorter than it was when opened.
        """
        assert self._open_files, "the checkpoint is closed"
        tensor = self.tensors[name]
        first, stop, step = (rows or slice(None)).indices(tensor.shape[0])
        assert step == 1, "rows have no step"
        num_rows = max(0, stop - first)
        row_bytes = (tensor.end - tensor.begin) // tensor.shape[0]
        stored, row_shape = TORCH_DTYPES[tensor.dtype], tensor.shape[1:]
        of_row = slice(0, row_bytes)
        if columns is not None:
            (width,) = row_shape
            left, right, step = columns.indices(width)
            assert step == 1, "columns have no step"
            row_shape, of_row = (right - left,), slice(left * stored.itemsize, right * stored.itemsize)
        out = torch.empty(num_rows, *row_shape, dtype=stored)
        if out.numel():
            begin = tensor.begin + first * row_bytes
            page = begin % mmap.ALLOCATIONGRANULARITY
            size = num_rows * row_bytes
            descriptor = self._open_files[tensor.path].fileno()
            try:
                mapped = mmap.mmap(descriptor, page + size, access=mmap.ACCESS_READ, offset=begin - page)
            except ValueError as error:  # mmap compares with the file's size of now; reading beyond it would kill us
                wanted = f"a file of at least {tensor.end} bytes, as when opened"
                raise tensor_error(name, tensor.path, wanted, f"a shorter one ({error})") from error
            with mapped, memoryview(mapped) as view, view[page:] as source:
                rows_of_bytes = np.frombuffer(source, np.uint8).reshape(num_rows, row_bytes)
                out.view(-1).view(torch.uint8).numpy().reshape(num_rows, -1)[:] = rows_of_bytes[:, of_row]
                del rows_of_bytes  # the mapping cannot end before those who look into it
        return out if dtype is None else out.to(dtype)

    def close(self) -> None:
        """Closes the files. Tensors that were read stay valid."""
        for file in self._open_files.values():
            file.close()
        self._open_files = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _read_index(directory: Path) -> dict[str, Path] | None:
    """Stored tensor name -> file as the index has it, None when the checkpoint is one file."""
    path = directory / INDEX_FILE
    single = directory / SINGLE_FILE
    if single.exists() and path.exists():
        raise file_error(directory, f"either {SINGLE_FILE} or {INDEX_FILE}", "both")
    if not path.exists():
        if not single.exists():
            others = ", ".join(sorted(other.name for other in directory.glob("*.safetensors"))[:3])
            found = f"neither, but {others}" if others else "neither"
            raise file_error(directory, f"{SINGLE_FILE} or {INDEX_FILE}", found)
        return None
    try:
        index = json.loads(path.read_bytes().decode(), object_pairs_hook=object_without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise file_error(path, "an index in JSON", f"{type(error).__name__}: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise file_error(path, "an object with a filled weight_map", f"weight_map {weight_map!r}")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or file_name in ("", ".", "..") or set(file_name) & {"/", "\\", "\0"}:
            raise tensor_error(name, path, "the name of a file beside the index", repr(file_name))
    return {name: directory / file_name for name, file_name in weight_map.items()}


def _collect(files: dict[Path, BinaryIO], index: dict[str, Path] | None) -> dict[str, StoredTensor]:
    """All tensors of all files by canonical name; the index, if any, must say the same as the headers."""
    found: dict[str, StoredTensor] = {}
    for path, file in files.items():
        for stored_name, tensor in read_header(file, path).items():
            name = names.canonical(stored_name)
            if name in found:
                twin = found[name]
                where = f"one more in {twin.path.name}" + (
                    f" as {twin.stored_name}" if twin.stored_name != stored_name else ""
                )
                raise tensor_error(stored_name, path, "one tensor of this name in the checkpoint", where)
            if index is not None and stored_name not in index:
                raise tensor_error(stored_name, path, f"an entry for it in {INDEX_FILE}", "none")
            found[name] = tensor
    for stored_name, path in (index or {}).items():
        actual = found.get(names.canonical(stored_name))
        if actual is None or actual.stored_name != stored_name or actual.path != path:
            what = "none there" if actual is None else f"{actual.stored_name} in {actual.path.name}"
            raise tensor_error(stored_name, path, f"the tensor, as {INDEX_FILE} says", what)
    return found


def _match(stored: dict[str, StoredTensor], config: ModelConfig, first_file: Path) -> dict[str, StoredTensor]:
    """The stored tensors in the order of the config's; raises for the first that is missing, surplus or wrong."""
    _check_counts(stored, config)
    matched: dict[str, StoredTensor] = {}
    for spec in names.expected(config):
        tensor = stored.get(spec.name)
        shape = f"shape {list(spec.shape)} ({spec.meaning} of config.json)"
        if tensor is None:
            paths = Counter(
                other.path for name, other in stored.items() if names.layer_of(name) == names.layer_of(spec.name)
            )
            path = paths.most_common(1)[0][0] if paths else first_file
            raise tensor_error(spec.name, path, shape, "no such tensor in any file" + _hint(config, spec.name))
        if tensor.dtype not in TORCH_DTYPES:
            allowed = " or ".join(TORCH_DTYPES)
            raise tensor_error(tensor.stored_name, tensor.path, f"dtype {allowed}", tensor.dtype)
        if tensor.shape != spec.shape:
            raise tensor_error(tensor.stored_name, tensor.path, shape, f"shape {list(tensor.shape)}")
        matched[spec.name] = tensor
    for name, tensor in stored.items():
        if name not in matched and not names.is_ignorable(name, config):
            what = f"{tensor.dtype} {list(tensor.shape)}"
            raise tensor_error(tensor.stored_name, tensor.path, "no tensor of this name", what)
    return matched


def _check_counts(stored: dict[str, StoredTensor], config: ModelConfig) -> None:
    """Numbers of layers and experts, first of all: else a wrong number shows as some tensor missing or surplus."""
    layers = {layer for name in stored if (layer := names.layer_of(name)) is not None}
    experts = {expert for name in stored if (expert := names.expert_of(name)) is not None}
    for what, key, count, present, index_of in (
        ("layer", "num_hidden_layers", config.num_layers, layers, names.layer_of),
        ("expert", "num_experts", config.num_experts, experts, names.expert_of),
    ):
        if not present:
            continue
        top = max(present)
        name, tensor = next((name, tensor) for name, tensor in stored.items() if index_of(name) == top)
        wanted = f"{what}s 0 to {count - 1} because {key} is {count} in config.json"
        if top >= count:
            raise tensor_error(name, tensor.path, wanted, f"tensors of {what} {top}")
        if len(present) < count:
            absent = next(i for i in range(count) if i not in present)
            found = f"{len(present)} {what}s, the highest {top}, and no tensor of {what} {absent}"
            raise tensor_error(name, tensor.path, wanted, found)


def _hint(config: ModelConfig, name: str) -> str:
    untied = name == names.head(config) and not config.tie_word_embeddings
    return " (needed because tie_word_embeddings is false)" if untied else ""
