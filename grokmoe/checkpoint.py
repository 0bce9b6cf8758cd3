"""A checkpoint on disk: a directory with config.json and tensors in one of the layouts of `grokmoe.layouts`.

Opening reads and checks headers only; reading maps exactly the bytes of one tensor, or of some of its rows, and
copies them out. So a role touches only its slice, and the host never holds more than one tensor beyond what a
caller keeps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from grokmoe import layouts
from grokmoe import tensor_names as names
from grokmoe.checkpoint_part import Needs, Part, whole
from grokmoe.config_keys import read_json_object
from grokmoe.errors import ConfigError
from grokmoe.layouts import Source, names_of_others
from grokmoe.layouts.layout import Contents
from grokmoe.layouts.mapped_file import tensor_error
from grokmoe.layouts.scaled_rows import ScaledRows
from grokmoe.layouts.source import TORCH_DTYPES
from grokmoe.model_config import ModelConfig

CONFIG_FILE = "config.json"


class Checkpoint:
    """An open checkpoint whose tensors are known to be exactly those its config asks for. A context manager.

    config: what config.json says, in the chosen variant. raw_config: its keys.
    tensors: how each is stored, by canonical name, in the order of the forward pass; those whose files are not here
    are missing. files: all that were looked at. layout: its name, for people.
    """

    def __init__(
        self, directory: Path, raw_config: Mapping[str, Any], config: ModelConfig, tensors: dict[str, Source],
        contents: Contents,
    ) -> None:  # fmt: skip
        """For `open`, which checks what it passes."""
        self.directory = directory
        self.raw_config, self.config, self.tensors = raw_config, config, tensors
        self.files, self.layout = contents.files, contents.title
        self._is_open = True

    @classmethod
    def open(cls, directory: str | Path, variant: str = "vllm", part: Part = whole) -> Checkpoint:
        """Reads config and headers, and checks every name, shape and type.

        variant: as in ModelConfig.as_variant. part: the tensors that must be there; files with others may be missing.
        Raises ConfigError for config.json, CheckpointError (tensor, file, expected, found) for anything else.
        """
        directory = Path(directory)
        raw, config = read_config(directory, variant)
        needs, layout = part(config), layouts.find(directory)
        if layout is None:
            raise layouts.nothing_found(directory)
        contents = layout.contents(config, needs)
        return cls(directory, raw, config, _match(contents, directory, config, needs), contents)

    def source(self, name: str) -> Source:
        """How a tensor is stored. name: canonical. Raises CheckpointError for one whose file is not here."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise tensor_error(name, self.directory, "its file", "none when the checkpoint was opened")
        return tensor

    def read(
        self, name: str, dtype: torch.dtype | None = None, rows: slice | None = None, columns: slice | None = None
    ) -> torch.Tensor:
        """One tensor as memory of the caller's own.

        name: canonical (grokmoe.tensor_names). dtype: None keeps the stored one, or what dequantising gives.
        rows: a range of the first dimension, without a step; only its bytes are mapped.
        columns: of a matrix, a range of the second, likewise; only the pages that its bytes lie on are read.
        Raises CheckpointError when the file is no longer the one that was opened.
        """
        assert self._is_open, "the checkpoint is closed"
        tensor = self.source(name)
        first, stop = _range(rows, tensor.shape[0])
        out = tensor.rows(first, stop, None if columns is None else slice(*_range(columns, tensor.shape[1])))
        return out if dtype is None else out.to(dtype)

    def pieces(
        self, name: str, max_bytes: int, dtype: torch.dtype | None = None, rows: slice | None = None,
        columns: slice | None = None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:  # fmt: skip
        """What `read` gives, in pieces of whole rows, each with its place in that.

        max_bytes: of a piece, which is larger where fewer rows would cost as much to read.
        """
        tensor = self.source(name)
        first, stop = _range(rows, tensor.shape[0])
        width = math.prod(tensor.shape[1:]) if columns is None else len(range(*_range(columns, tensor.shape[1])))
        row_bytes = max(1, width * (dtype or tensor.values or torch.float32).itemsize)
        step = max(1, tensor.rows_at_once, max_bytes // row_bytes)
        for begin in range(first, stop, step):
            end = min(begin + step, stop)
            yield slice(begin - first, end - first), self.read(name, dtype, slice(begin, end), columns)

    def is_in_8_bits(self, name: str) -> bool:
        """Whether a matrix is stored in float8_e4m3fn with scales."""
        return isinstance(self.source(name), ScaledRows)

    def pieces_in_8_bits(
        self, name: str, max_bytes: int, rows: slice | None = None, columns: slice | None = None
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """As `pieces`, of a matrix that is: each with the scale of each of its rows, float32."""
        tensor = self.source(name)
        assert isinstance(tensor, ScaledRows), f"{name} is not in eight bits"
        first, stop = _range(rows, tensor.shape[0])
        wanted = slice(*_range(columns, tensor.shape[1]))
        step = max(1, max_bytes // max(1, wanted.stop - wanted.start))
        for begin in range(first, stop, step):
            end = min(begin + step, stop)
            yield slice(begin - first, end - first), *tensor.rows_in_8_bits(begin, end, wanted)

    def close(self) -> None:
        """Ends reading. Tensors that were read stay valid."""
        self._is_open = False

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _range(part: slice | None, size: int) -> tuple[int, int]:
    first, stop, step = (part or slice(None)).indices(size)
    assert step == 1, "rows and columns have no step"
    return first, max(first, stop)


def read_config(directory: Path, variant: str = "vllm") -> tuple[dict[str, Any], ModelConfig]:
    """The keys of a checkpoint's config.json, or of what says the same where a layout has none; and what they mean.

    variant: as in ModelConfig.as_variant. Raises ConfigError, and CheckpointError for a layout that cannot be read.
    """
    path = directory / CONFIG_FILE
    layout = None if path.exists() else layouts.find(directory)
    raw = (layout.config() if layout is not None else None) or read_json_object(path)
    try:
        return dict(raw), ModelConfig.from_dict(raw, variant)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from error


def _match(contents: Contents, directory: Path, config: ModelConfig, needs: Needs) -> dict[str, Source]:
    """The stored tensors in the order of the config's; raises for the first that is missing, surplus or wrong."""
    stored = contents.sources
    _check_counts(contents, directory, config)
    matched: dict[str, Source] = {}
    for spec in names.expected(config):
        tensor = stored.get(spec.name)
        shape = f"shape {list(spec.shape)} ({spec.meaning} of config.json)"
        if tensor is None:
            if spec.name in contents.names and not needs(spec.name):
                continue  # it is elsewhere, and nobody here needs it
            found = "no such tensor in any file" + _hint(config, spec.name)
            raise tensor_error(spec.name, _likely_file(contents, directory, spec.name), shape, found)
        if tensor.values is None:
            allowed = " or ".join(TORCH_DTYPES)
            raise tensor_error(tensor.stored_name, tensor.path, f"dtype {allowed}", tensor.dtype)
        if tensor.shape != spec.shape:
            raise tensor_error(tensor.stored_name, tensor.path, shape, f"shape {list(tensor.shape)}")
        matched[spec.name] = tensor
    expected = {spec.name for spec in names.expected(config)}
    for name, tensor in stored.items():
        if name not in matched and not names.is_ignorable(name, config) and not _is_empty_bias(name, tensor, expected):
            what = f"{tensor.dtype} {list(tensor.shape)}"
            raise tensor_error(tensor.stored_name, tensor.path, "no tensor of this name", what)
    return matched


def _is_empty_bias(name: str, tensor: Source, expected: Collection[str]) -> bool:
    """Whether this is the bias of zeros that GPTQ's tools add to matrices that have none.

    Raises CheckpointError for any other bias of a matrix of the model: without it, the model would be another.
    """
    if not name.endswith(".bias") or names_of_others.canonical(name.removesuffix("bias") + "weight") not in expected:
        return False
    if tensor.values is None or len(tensor.shape) != 1 or tensor.rows(0, tensor.shape[0]).any():
        found = f"{tensor.dtype} {list(tensor.shape)} with other values"
        raise tensor_error(tensor.stored_name, tensor.path, "no tensor of this name, or one of zeros", found)
    return True


def _likely_file(contents: Contents, directory: Path, name: str) -> Path:
    """Where a missing tensor would be expected: with most others of its layer."""
    paths = Counter(
        other.path for each, other in contents.sources.items() if names.layer_of(each) == names.layer_of(name)
    )
    return paths.most_common(1)[0][0] if paths else next(iter(contents.files), directory)


def _check_counts(contents: Contents, directory: Path, config: ModelConfig) -> None:
    """Numbers of layers and experts, first of all: else a wrong number shows as some tensor missing or surplus."""
    for what, key, count, index_of in (
        ("layer", "num_hidden_layers", config.num_layers, names.layer_of),
        ("expert", "num_experts", config.num_experts, names.expert_of),
    ):
        present = {index for name in contents.names if (index := index_of(name)) is not None}
        if not present:
            continue
        top = max(present)
        name = next((name for name in contents.sources if index_of(name) == top), f"of {what} {top}")
        path = contents.sources[name].path if name in contents.sources else directory
        wanted = f"{what}s 0 to {count - 1} because {key} is {count} in config.json"
        if top >= count:
            raise tensor_error(name, path, wanted, f"tensors of {what} {top}")
        if len(present) < count:
            absent = next(i for i in range(count) if i not in present)
            found = f"{len(present)} {what}s, the highest {top}, and no tensor of {what} {absent}"
            raise tensor_error(name, path, wanted, found)


def _hint(config: ModelConfig, name: str) -> str:
    untied = name == names.head(config) and not config.tie_word_embeddings
    return " (needed because tie_word_embeddings is false)" if untied else ""
