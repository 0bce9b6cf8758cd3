"""The header of a GGUF file, read with every bound checked.

A file is: magic, version, number of tensors, number of fields; fields (name, type, value); tensors (name, sizes with
the innermost first, type, offset); padding; data. Source: ggml's docs/gguf.md. The `gguf` package reads the same, but
believes the lengths that a file claims (docs/decisions/0016-checkpoints-of-others.md).
"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any, BinaryIO

import numpy as np

from grokmoe.layouts.mapped_file import MappedFile, file_error, tensor_error

MAGIC = b"GGUF"
VERSIONS = (2, 3)

MAX_HEADER_BYTES = 256 * 1024 * 1024
"""A vocabulary of 131072 tokens with its merges takes some 10 MB."""

MAX_DIMENSIONS = 4

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9

DEFAULT_ALIGNMENT = 32


@dataclasses.dataclass(frozen=True)
class TensorType:
    """A type of ggml's: so many elements of a row take so many bytes together."""

    name: str
    elements: int
    bytes: int


TYPES = {
    number: TensorType(*fields)
    for number, fields in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2),
    }.items()
}  # fmt: skip
"""By ggml's numbers: those that llama.cpp's quantisations of this architecture are made of."""


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in its file. shape: outermost first, as in torch."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """fields: by name; of an array, its length."""

    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(file: BinaryIO, mapped: MappedFile) -> GgufHeader:
    """The header of a file. file: `mapped`, open. Raises CheckpointError."""
    return _Reader(file, mapped).header()


class _Reader:
    def __init__(self, file: BinaryIO, mapped: MappedFile) -> None:
        self._file, self._mapped = file, mapped

    def header(self) -> GgufHeader:
        path = self._mapped.path
        magic, version = self._take(4), self._number("<I")
        if magic != MAGIC or version not in VERSIONS:
            raise file_error(path, "a little-endian GGUF file of version 2 or 3", f"{magic!r}, version {version}")
        num_tensors, num_fields = self._number("<Q"), self._number("<Q")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = self._string()
            if name in fields:
                raise file_error(path, f"one field {name}", "one more")
            fields[name] = self._value(self._number("<I"))
        found = [self._tensor() for _ in range(num_tensors)]
        alignment = fields.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise file_error(path, "an alignment above 0", alignment)
        start = -(-self._file.tell() // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for tensor in found:
            if tensor.name in tensors:
                raise tensor_error(tensor.name, path, "one tensor of this name", "one more")
            placed = dataclasses.replace(tensor, begin=start + tensor.begin)
            end = placed.begin + placed.num_bytes
            if end > self._mapped.size:
                wanted = f"a file of at least {end} bytes"
                raise tensor_error(tensor.name, path, wanted, f"{self._mapped.size} bytes (truncated)")
            tensors[tensor.name] = placed
        return GgufHeader(fields, tensors)

    def _take(self, size: int) -> bytes:
        self._check(size)
        return self._file.read(size)

    def _check(self, size: int) -> None:
        """That so many bytes follow. Every loop over what a file claims to have comes by here, so it ends with it."""
        at = self._file.tell()
        if at + size > self._mapped.size:
            found = f"{self._mapped.size} bytes (truncated)"
            raise file_error(self._mapped.path, f"a GGUF file of at least {at + size} bytes", found)
        if at + size > MAX_HEADER_BYTES:
            raise file_error(self._mapped.path, f"a header of at most {MAX_HEADER_BYTES} bytes", "a longer one")

    def _skip(self, size: int) -> None:
        self._check(size)
        self._file.seek(size, 1)

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _string(self) -> str:
        return self._take(self._number("<Q")).decode(errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _FLOAT32:  # as the shortest decimal that is the same, else 1e-5 is 9.999999747378752e-06
            return float(str(np.float32(self._number(_SCALARS[kind]))))
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise file_error(self._mapped.path, "a field of a type of GGUF's", f"type {kind}")
        item, length = self._number("<I"), self._number("<Q")
        if item in _SCALARS:
            self._skip(length * struct.calcsize(_SCALARS[item]))
        elif item == _STRING:
            for _ in range(length):
                self._skip(self._number("<Q"))
        else:
            raise file_error(self._mapped.path, "an array of numbers or strings", f"one of type {item}")
        return length

    def _tensor(self) -> GgufTensor:
        """begin: as in the file, from the beginning of the data."""
        name, path = self._string(), self._mapped.path
        dimensions = self._number("<I")
        if dimensions > MAX_DIMENSIONS:
            raise tensor_error(name, path, f"at most {MAX_DIMENSIONS} dimensions", dimensions)
        shape = tuple(reversed([self._number("<Q") for _ in range(dimensions)]))
        number, begin = self._number("<I"), self._number("<Q")
        kind = TYPES.get(number)
        if kind is None:
            raise tensor_error(name, path, f"a type of {', '.join(each.name for each in TYPES.values())}",
                               f"ggml's type {number}")  # fmt: skip
        row = shape[-1] if shape else 1
        if row % kind.elements:
            raise tensor_error(name, path, f"rows of a multiple of {kind.elements} for {kind.name}", row)
        num_bytes = math.prod(shape) // kind.elements * kind.bytes
        return GgufTensor(name, kind, shape, begin, num_bytes)
