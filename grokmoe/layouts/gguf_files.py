"""GGUF files of llama.cpp's architecture `grok`: one, or the parts of a split one.

What is stored in blocks of quantised values is dequantised by the `gguf` package (the extra of that name), row by row.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from grokmoe.checkpoint_part import Needs
from grokmoe.errors import ConfigError
from grokmoe.layouts import gguf_names
from grokmoe.layouts.gguf_header import GgufHeader, GgufTensor, read_gguf
from grokmoe.layouts.layout import Contents
from grokmoe.layouts.mapped_file import MappedFile, file_error, tensor_error
from grokmoe.layouts.source import TORCH_DTYPES, Source, StoredRows
from grokmoe.model_config import ModelConfig

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclasses.dataclass(frozen=True)
class GgufFiles:
    """The files of one model, in order."""

    paths: tuple[Path, ...]

    @classmethod
    def find(cls, directory: Path) -> GgufFiles | None:
        """The layout, if it is that of the directory. Raises CheckpointError for more than one model."""
        paths = sorted(directory.glob("*.gguf"))
        if not paths:
            return None
        models = {match[1] if (match := _PART.fullmatch(path.name)) else path.name for path in paths}
        if len(models) > 1:
            raise file_error(directory, "the GGUF files of one model", ", ".join(sorted(models)))
        if match := _PART.fullmatch(paths[0].name):
            wanted = [f"{match[1]}-{number:05}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]
            if [path.name for path in paths] != wanted:
                found = f"{len(paths)} of them"
                raise file_error(directory, f"the {len(wanted)} parts of {match[1]}", found)
        return cls(tuple(paths))

    def config(self) -> Mapping[str, Any]:
        """What the first file's header says."""
        headers = self._headers()
        path, (_, first) = next(iter(headers.items()))
        architecture = first.fields.get("general.architecture")
        if architecture != gguf_names.ARCHITECTURE:
            raise file_error(path, f"a model of the architecture {gguf_names.ARCHITECTURE}", architecture)
        everything = {name: tensor for _, header in headers.values() for name, tensor in header.tensors.items()}
        embedding = everything.get("token_embd.weight")
        if embedding is None:
            raise tensor_error("token_embd.weight", path, "the embedding", "no such tensor")
        return gguf_names.config_from(first.fields, embedding.shape[0], "output.weight" not in everything, path)

    def contents(self, config: ModelConfig, needs: Needs) -> Contents:
        """See Layout. All files must be there."""
        wanted = {tensor.name: tensor for tensor in gguf_names.tensors(config)}
        found: dict[str, Source] = {}
        kinds = set()
        for path, (mapped, header) in self._headers().items():
            for tensor in header.tensors.values():
                name = gguf_names.usual_spelling(tensor.name)
                ours = wanted[name].ours if name in wanted else (tensor.name,)
                if name == "output.weight":
                    ours = ("lm_head.weight",)  # of a tied model, nothing but the embedding once more
                kinds.add(tensor.type.name)
                for each, source in _sources(ours, tensor, mapped, name in wanted and wanted[name].is_stacked).items():
                    if each in found:
                        raise tensor_error(tensor.name, path, "one tensor of this name", "one more")
                    found[each] = source
        return Contents(found, frozenset(found), self.paths, f"GGUF of {', '.join(sorted(kinds))}")

    def _headers(self) -> dict[Path, tuple[MappedFile, GgufHeader]]:
        headers = {}
        for path in self.paths:
            try:
                with path.open("rb") as file:
                    mapped = MappedFile.of(path, file.fileno())
                    headers[path] = (mapped, read_gguf(file, mapped))
            except OSError as error:
                raise file_error(path, "a GGUF file", error.strerror) from error
        return headers


def _sources(ours: tuple[str, ...], tensor: GgufTensor, mapped: MappedFile, is_stacked: bool) -> dict[str, Source]:
    """The tensors of ours that one of a file's is."""
    shape, number = tensor.shape, len(ours)
    if is_stacked:
        if len(shape) != 3 or shape[0] != number:
            wanted = f"shape [{number}, out, in] because num_experts is {number}"
            raise tensor_error(tensor.name, mapped.path, wanted, f"shape {list(shape)}")
        shape = shape[1:]
    size = tensor.num_bytes // number
    sources: dict[str, Source] = {}
    for index, name in enumerate(ours):
        stored_name = f"{tensor.name}[{index}]" if is_stacked else tensor.name
        fields = (stored_name, mapped.path, tensor.type.name, shape, size, mapped, tensor.begin + index * size)
        sources[name] = StoredRows(*fields) if tensor.type.name in TORCH_DTYPES else QuantisedRows(*fields)
    return sources


@dataclasses.dataclass(frozen=True)
class QuantisedRows(StoredRows):
    """Rows of quantised blocks. dtype: ggml's name of the type."""

    @property
    def values(self) -> torch.dtype:
        """Dequantised values are float32."""
        return torch.float32

    def rows(self, first: int, stop: int, columns: slice | None = None) -> torch.Tensor:
        """See Source. Whole rows are dequantised. Raises ConfigError without the package that knows the type."""
        try:
            import gguf
        except ImportError:
            raise ConfigError(f"{self.path}: stored as {self.dtype}, which needs grokmoe[server,gguf]") from None
        if first == stop:
            return torch.empty(0, *self.shape[1:])[:, columns or slice(None)]
        row_bytes = self.num_bytes // self.shape[0]
        stored = self.file.map(self.begin + first * row_bytes, self.begin + stop * row_bytes, self.stored_name)
        kind = gguf.GGMLQuantizationType[self.dtype]
        values = gguf.quants.dequantize(stored.reshape(stop - first, row_bytes), kind)
        rows = torch.from_numpy(values.reshape(stop - first, *self.shape[1:]))
        return rows if columns is None else rows[:, columns].contiguous()
