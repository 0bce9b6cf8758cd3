"""A tensor of a checkpoint, wherever and however it is stored: its rows are read without the others.

Letters: R rows that are asked for.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from grokmoe.layouts.mapped_file import MappedFile

TORCH_DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The types a weight may be stored in as it is, by their names in safetensors."""

_ELEMENTS = TORCH_DTYPES | {"F8_E4M3": torch.float8_e4m3fn}
"""The types that can be read from a file; of those beyond, something else must be said (`scaled_rows`)."""


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC):
    """What is known of a tensor without reading it.

    stored_name: its spelling in the file at `path`. shape: as the model has it, [out, in] for a matrix.
    dtype: what it is stored in, for people. num_bytes: what it takes on disk, everything included.
    """

    stored_name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    rows_at_once = 1
    """Fewer rows than these cost as much to read."""

    @property
    def values(self) -> torch.dtype | None:
        """The type that `rows` gives; None for one that no weight is stored in."""
        return TORCH_DTYPES.get(self.dtype)

    @abc.abstractmethod
    def rows(self, first: int, stop: int, columns: slice | None = None) -> torch.Tensor:
        """Rows [first, stop) as memory of the caller's own, [R, ...]; of a matrix, `columns` [start, stop) of them.

        Raises CheckpointError for a file that has changed.
        """


@dataclasses.dataclass(frozen=True)
class StoredRows(Source):
    """A tensor that lies in its file as the model wants it: bytes [begin, end) of `file`."""

    file: MappedFile
    begin: int

    @property
    def end(self) -> int:
        """Where it ends in the file."""
        return self.begin + self.num_bytes

    def rows(self, first: int, stop: int, columns: slice | None = None) -> torch.Tensor:
        """See Source. Only the bytes of these rows are mapped, and of columns only their pages read."""
        element = _ELEMENTS[self.dtype]
        row_bytes, item = self.num_bytes // self.shape[0], element.itemsize
        of_row = slice(0, row_bytes) if columns is None else slice(columns.start * item, columns.stop * item)
        shape = self.shape[1:] if columns is None else (columns.stop - columns.start,)
        out = torch.empty(stop - first, *shape, dtype=element)
        if out.numel():
            stored = self.file.map(self.begin + first * row_bytes, self.begin + stop * row_bytes, self.stored_name)
            into = out.view(-1).view(torch.uint8).numpy().reshape(stop - first, -1)
            into[:] = stored.reshape(stop - first, row_bytes)[:, of_row]  # numpy lets other threads run meanwhile
        return out

    def whole(self) -> torch.Tensor:
        """All of it; also one without dimensions."""
        if self.shape:
            return self.rows(0, self.shape[0])
        return dataclasses.replace(self, shape=(1,)).rows(0, 1)[0]


@dataclasses.dataclass(frozen=True)
class JoinedRows(Source):
    """A tensor that was cut into equal parts along dimension 0 or 1, in order."""

    parts: tuple[Source, ...]
    dim: int

    @classmethod
    def of(cls, parts: Sequence[Source], shape: tuple[int, ...]) -> JoinedRows | None:
        """The parts as one tensor of this shape, None when they do not make one."""
        first = parts[0]
        for dim in range(min(2, len(shape))):
            whole = (*first.shape[:dim], sum(part.shape[dim] for part in parts), *first.shape[dim + 1 :])
            alike = all(part.dtype == first.dtype and part.shape == first.shape for part in parts)
            if alike and whole == shape and len(first.shape) == len(shape):
                num_bytes = sum(part.num_bytes for part in parts)
                return cls(first.stored_name, first.path, first.dtype, shape, num_bytes, tuple(parts), dim)
        return None

    def rows(self, first: int, stop: int, columns: slice | None = None) -> torch.Tensor:
        """See Source. Touches only the parts that have some of this."""
        size = self.parts[0].shape[self.dim]
        wanted = slice(first, stop) if self.dim == 0 else columns or slice(0, self.shape[1])
        pieces = []
        for index, part in enumerate(self.parts):
            low, high = max(wanted.start - index * size, 0), min(wanted.stop - index * size, size)
            if low < high:
                cut = (low, high, columns) if self.dim == 0 else (first, stop, slice(low, high))
                pieces.append(part.rows(*cut))
        if not pieces:
            return self.parts[0].rows(0, 0, columns) if self.dim == 0 else self.parts[0].rows(first, stop, slice(0, 0))
        return torch.cat(pieces, dim=self.dim)
