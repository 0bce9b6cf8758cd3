"""Writes a safetensors file piece by piece, so that tensors of any size need little memory.

The form of the file: `grokmoe.layouts.safetensors_header`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from grokmoe.layouts.source import TORCH_DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

HEADER_ALIGNMENT = 8
"""The data of a safetensors file begins at a multiple of this."""

UNFINISHED = ".unfinished"
"""Ends the name of a file that is being written."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a header says of a tensor, and the tensor's rows in order, in pieces of any length."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        """How much its data is."""
        return math.prod(self.shape) * self.dtype.itemsize


def file_size(entries: Mapping[str, Entry]) -> int:
    """Bytes of a file with these tensors."""
    return len(_header(entries)) + sum(entry.num_bytes for entry in entries.values())


def write_tensors(path: Path, entries: Mapping[str, Entry], on_bytes: Callable[[int], None] = lambda size: None) -> str:
    """One file, which has its name once it is whole and on the disk. Returns its SHA-256 in hex digits.

    entries: by the names they get. on_bytes: told of all bytes as they are written.
    """
    digest = hashlib.sha256()
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("wb") as file:

        def write(data: Any) -> None:
            file.write(data)
            digest.update(data)
            on_bytes(len(data))

        write(_header(entries))
        for entry in entries.values():
            for piece in entry.pieces():
                write(piece.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    return digest.hexdigest()


def _header(entries: Mapping[str, Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.num_bytes
        dtype = DTYPE_NAMES[entry.dtype]
        header[name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
