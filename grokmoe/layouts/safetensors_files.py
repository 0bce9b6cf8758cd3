"""Checkpoints in safetensors: one file, shards with an index, or the shards of a tensor-parallel group.

The last is how Grok-2 is published: `*-TP-003.safetensors` has rank 3's part of every tensor that is cut, and
`*-TP-common.safetensors` the tensors that are not. Names are those of any program in `names_of_others`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grokmoe import tensor_names
from grokmoe.checkpoint_part import Needs
from grokmoe.layouts import names_of_others as naming
from grokmoe.layouts.layout import Contents
from grokmoe.layouts.mapped_file import MappedFile, file_error, tensor_error
from grokmoe.layouts.safetensors_header import object_without_duplicates, read_header
from grokmoe.layouts.scaled_rows import with_scales
from grokmoe.layouts.source import JoinedRows, Source, StoredRows
from grokmoe.model_config import ModelConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_RANK = re.compile(r".*-TP-(\d{3}|common)\.safetensors")


@dataclasses.dataclass(frozen=True)
class SafetensorsFiles:
    """One file, or shards with an index."""

    directory: Path

    @classmethod
    def find(cls, directory: Path) -> SafetensorsFiles | None:
        """The layout, if it is that of the directory. Raises CheckpointError when it is both forms at once."""
        single, index = (directory / SINGLE_FILE).exists(), (directory / INDEX_FILE).exists()
        if single and index:
            raise file_error(directory, f"either {SINGLE_FILE} or {INDEX_FILE}", "both")
        return cls(directory) if single or index else None

    def config(self) -> None:
        """None: safetensors come with a config.json."""

    def contents(self, config: ModelConfig, needs: Needs) -> Contents:
        """See Layout."""
        if (self.directory / SINGLE_FILE).exists():
            path = self.directory / SINGLE_FILE
            found = _collect({path: _read(path)})
            return Contents(with_scales(found), frozenset(found), (path,), f"safetensors, {_title(found)}")
        index = read_index(self.directory / INDEX_FILE)
        stored: dict[Path, dict[str, StoredRows]] = {}
        for path in dict.fromkeys(index.values()):
            if path.exists():
                stored[path] = _read(path)
            else:
                needed = (name for name, place in index.items() if place == path and needs(naming.canonical(name)))
                if (name := next(needed, None)) is not None:
                    raise tensor_error(name, path, f"the shard that {INDEX_FILE} names", "no such file")
        found = _collect(stored)
        _compare(found, index, stored)
        known = frozenset(map(naming.canonical, index))
        title = f"safetensors in {len(stored)} files, {_title(found)}"
        return Contents(with_scales(found), known, tuple(stored), title)


@dataclasses.dataclass(frozen=True)
class TensorParallelFiles:
    """The shards of a tensor-parallel group, which have no index."""

    directory: Path

    @classmethod
    def find(cls, directory: Path) -> TensorParallelFiles | None:
        """The layout, if it is that of the directory."""
        return cls(directory) if _rank_files(directory) else None

    def config(self) -> None:
        """None: safetensors come with a config.json."""

    def contents(self, config: ModelConfig, needs: Needs) -> Contents:
        """See Layout. All files must be there: only their headers tell which tensors they have."""
        files = _rank_files(self.directory)
        ranks = sorted({rank for rank in files.values() if rank != "common"})
        if ranks != [f"{rank:03}" for rank in range(len(ranks))]:
            raise file_error(self.directory, f"files of ranks 000 to {ranks[-1]}", ", ".join(ranks))
        common = _collect({path: _read(path) for path, rank in files.items() if rank == "common"})
        per_rank = [_collect({path: _read(path) for path, of in files.items() if of == rank}) for rank in ranks]
        shapes = {spec.name: spec.shape for spec in tensor_names.expected(config)}
        found: dict[str, Source] = dict(common)
        for name in dict.fromkeys(name for tensors in per_rank for name in tensors):
            parts = [tensors[name] for tensors in per_rank if name in tensors]
            first = parts[0]
            if name in common:
                twin = common[name].path.name
                raise tensor_error(first.stored_name, first.path, "one tensor of this name", f"one more in {twin}")
            if len(parts) < len(ranks):
                missing = next(rank for rank, tensors in zip(ranks, per_rank, strict=True) if name not in tensors)
                raise tensor_error(first.stored_name, first.path, f"a part of it in each of {len(ranks)} ranks",
                                   f"none of rank {missing}")  # fmt: skip
            joined = JoinedRows.of(parts, shapes[name]) if name in shapes else None
            found[name] = joined or first
        title = f"safetensors of {len(ranks)} tensor-parallel ranks, {_title(found)}"
        return Contents(found, frozenset(found), tuple(files), title)


def _rank_files(directory: Path) -> dict[Path, str]:
    """File -> its rank, or "common"; by rank."""
    found = {path: match[1] for path in directory.glob("*.safetensors") if (match := _RANK.fullmatch(path.name))}
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))


def _title(found: Mapping[str, Source]) -> str:
    return naming.title(frozenset(source.stored_name for source in found.values()))


def _read(path: Path) -> dict[str, StoredRows]:
    """The tensors of a file by their stored names."""
    try:
        with path.open("rb") as file:
            return read_header(file, MappedFile.of(path, file.fileno()))
    except OSError as error:
        raise file_error(path, "a checkpoint", error.strerror) from error


def _collect(stored: Mapping[Path, Mapping[str, StoredRows]]) -> dict[str, StoredRows]:
    """All tensors of all files by canonical name."""
    found: dict[str, StoredRows] = {}
    for path, tensors in stored.items():
        for stored_name, tensor in tensors.items():
            twin = found.setdefault(naming.canonical(stored_name), tensor)
            if twin is not tensor:
                spelled = f" as {twin.stored_name}" if twin.stored_name != stored_name else ""
                where = f"one more in {twin.path.name}{spelled}"
                raise tensor_error(stored_name, path, "one tensor of this name in the checkpoint", where)
    return found


def read_index(path: Path) -> dict[str, Path]:
    """Stored tensor name -> file as the index at `path` has it. Raises CheckpointError."""
    try:
        index = json.loads(path.read_bytes().decode(), object_pairs_hook=object_without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise file_error(path, "an index in JSON", f"{type(error).__name__}: {error}") from error
    weight_map: Any = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise file_error(path, "an object with a filled weight_map", f"weight_map {weight_map!r}")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or file_name in ("", ".", "..") or set(file_name) & {"/", "\\", "\0"}:
            raise tensor_error(name, path, "the name of a file beside the index", repr(file_name))
    return {name: path.with_name(file_name) for name, file_name in weight_map.items()}


def _compare(found: Mapping[str, Source], index: Mapping[str, Path], stored: Mapping[Path, object]) -> None:
    """The index must say the same as the headers of the files that are here."""
    for source in found.values():
        if source.stored_name not in index:
            raise tensor_error(source.stored_name, source.path, f"an entry for it in {INDEX_FILE}", "none")
    for name, path in index.items():
        actual = found.get(naming.canonical(name))
        if path in stored and (actual is None or actual.stored_name != name or actual.path != path):
            what = "none there" if actual is None else f"{actual.stored_name} in {actual.path.name}"
            raise tensor_error(name, path, f"the tensor, as {INDEX_FILE} says", what)
