"""Any checkpoint as one of ours: safetensors under our names, an index, and the SHA-256 of every file.

Written file by file, each with its name once it is whole, and noted in a journal. So a conversion that was killed goes
on with the file that it was at when it is started again. `config.json` comes last: a directory that has it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from grokmoe import checksums
from grokmoe.checkpoint import CONFIG_FILE, Checkpoint
from grokmoe.errors import CheckpointError
from grokmoe.layouts.safetensors_files import INDEX_FILE
from grokmoe.safetensors_file import UNFINISHED, Entry, file_size, write_tensors
from grokmoe.shard_plan import Plan, by_expert, by_size

JOURNAL = "conversion" + UNFINISHED
"""First line: what is converted, and how. Then a line of `checksums` for every file that is whole."""

PIECE_BYTES = 2 * 1024 * 1024
"""Of a tensor in memory at a time; more where a layout cannot give less at a reasonable price."""

COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
"""What may lie beside a checkpoint and is copied with it."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to convert. dtype: None keeps each tensor's own. max_shard_bytes: None makes a file per layer and expert."""

    dtype: torch.dtype | None = None
    max_shard_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion has done. num_bytes: of all files of tensors. num_kept: files that an earlier try had made."""

    num_files: int
    num_bytes: int
    num_kept: int


Report = Callable[[str, int, int], None]
"""(file, bytes written of all, bytes in all)."""


def convert(
    source: Checkpoint,
    directory: str | Path,
    options: Options = Options(),
    report: Report = lambda file, done, total: None,
) -> Converted:
    """Writes `source` to a directory, or goes on where an earlier try has ended.

    Raises CheckpointError for a directory that holds a checkpoint, or what is left of another conversion; for a disk
    without room; while another process converts to the same directory; and for files of `source` that change.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / CONFIG_FILE).exists():
        raise CheckpointError(f"{directory}: already holds a checkpoint")
    entries = {name: _entry(source, name, options.dtype) for name in source.tensors}
    plan = _plan(source, entries, options)
    sizes = {file: file_size({name: entries[name] for name in tensors}) for file, tensors in plan.items()}
    with _Journal.open(directory, _what(source, options)) as journal:
        kept = journal.kept(sizes)
        total, done = sum(sizes.values()), sum(sizes[file] for file in kept)
        _check_room(directory, total - done)
        for file, tensors in plan.items():
            if file in kept:
                continue

            def on_bytes(size: int, file: str = file) -> None:
                nonlocal done
                done += size
                report(file, done, total)

            report(file, done, total)
            digest = write_tensors(directory / file, {name: entries[name] for name in tensors}, on_bytes)
            journal.note(file, digest)
        num_bytes = sum(entry.num_bytes for entry in entries.values())
        _finish(source, directory, plan, options, num_bytes, {file: journal.digests[file] for file in plan})
        journal.remove()
    return Converted(len(plan), total, len(kept))


def _entry(source: Checkpoint, name: str, dtype: torch.dtype | None) -> Entry:
    tensor = source.source(name)
    dtype = dtype or tensor.values
    assert dtype is not None, "a matched tensor has values"
    return Entry(dtype, tensor.shape, lambda: (piece for _, piece in source.pieces(name, PIECE_BYTES, dtype)))


def _plan(source: Checkpoint, entries: dict[str, Entry], options: Options) -> Plan:
    if options.max_shard_bytes is None:
        return by_expert(source.config)
    return by_size({name: entry.num_bytes for name, entry in entries.items()}, options.max_shard_bytes)


def _what(source: Checkpoint, options: Options) -> str:
    """What is converted and how, in one line: two conversions with the same may go on with each other's files."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    described = {
        "from": str(source.directory.resolve()),
        "files": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "config": source.config.content_hash,
        "dtype": str(options.dtype),
        "max_shard_bytes": options.max_shard_bytes,
    }
    return json.dumps(described, sort_keys=True)


def _check_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise CheckpointError(f"{directory}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def _finish(
    source: Checkpoint, directory: Path, plan: Plan, options: Options, num_bytes: int, digests: dict[str, str]
) -> None:
    """Everything but tensors, config.json last. num_bytes: of all tensors."""
    weight_map = {name: file for file, tensors in plan.items() for name in tensors}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    config = dict(source.raw_config)
    if options.dtype is not None:
        config["torch_dtype"] = str(options.dtype).removeprefix("torch.")
    texts = {INDEX_FILE: json.dumps(index, indent=2) + "\n", CONFIG_FILE: json.dumps(config, indent=2) + "\n"}
    for name in COMPANIONS:
        if (source.directory / name).is_file():
            _write(directory / name, (source.directory / name).read_bytes())
            digests[name] = checksums.of_file(directory / name)
    digests |= {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    _write(directory / INDEX_FILE, texts[INDEX_FILE].encode())
    _write(directory / checksums.FILE, checksums.to_text(digests).encode())
    _write(directory / CONFIG_FILE, texts[CONFIG_FILE].encode())


def _write(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


class _Journal:
    """The files that are whole. One process at a time has it."""

    def __init__(self, path: Path, file: Any, digests: dict[str, str]) -> None:
        self._path, self._file, self.digests = path, file, digests

    @classmethod
    @contextlib.contextmanager
    def open(cls, directory: Path, what: str) -> Iterator[_Journal]:
        path = directory / JOURNAL
        if not path.exists():
            for other in sorted(directory.glob("*.safetensors*")):
                raise CheckpointError(f"{directory}: already holds a checkpoint, or part of one: {other.name}")
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CheckpointError(f"{directory}: another process is converting to it") from error
            file.seek(0)
            lines = file.read().splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n"):  # killed while it was written
                file.truncate(sum(map(len, lines[:-1])))
                lines.pop()
            if lines and lines[0] != what + "\n":
                found = f"what is left of another conversion ({lines[0].strip()}): remove it, or convert elsewhere"
                raise CheckpointError(f"{directory}: holds {found}")
            journal = cls(path, file, checksums.from_text("".join(lines[1:]), path))
            if not lines:
                journal._append(what + "\n")
            yield journal

    def kept(self, sizes: dict[str, int]) -> set[str]:
        """The files that are noted and have the size they should."""
        return {
            file
            for file, size in sizes.items()
            if file in self.digests and (path := self._path.with_name(file)).exists() and path.stat().st_size == size
        }

    def note(self, file: str, digest: str) -> None:
        """A file is whole."""
        self.digests[file] = digest
        self._append(checksums.to_text({file: digest}))

    def remove(self) -> None:
        """All is done."""
        self._path.unlink()

    def _append(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())
