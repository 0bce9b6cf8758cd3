"""The header of a safetensors file, read with every bound checked: a damaged file gives our error, never a crash.

A file is: length of the header (8 bytes, little-endian), header (JSON: name -> dtype, shape, data_offsets), data.
Tensors lie end to end: a gap, an overlap or bytes left over mean that the file is not what was written.
"""

from __future__ import annotations

import json
import math
from typing import Any, BinaryIO

from grokmoe.layouts.mapped_file import MappedFile, file_error, tensor_error
from grokmoe.layouts.source import StoredRows

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

ITEM_SIZE = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
"""Bytes per element of the types whose size is checked against the shape; others are let through unchecked here."""


def object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=...)`. ValueError when a key occurs twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in result if keys.count(key) > 1)!r} occurs twice")
    return result


def read_header(file: BinaryIO, mapped: MappedFile) -> dict[str, StoredRows]:
    """The tensors of a file by their stored names, in the order of the header.

    file: `mapped`, open. Raises CheckpointError naming the file, and the tensor where there is one.
    """
    path, file_size = mapped.path, mapped.size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise file_error(path, "a safetensors file of at least 8 bytes", f"{file_size} bytes (truncated)")
    header_size = int.from_bytes(prefix, "little")
    if header_size > MAX_HEADER_BYTES:
        raise file_error(path, f"a header of at most {MAX_HEADER_BYTES} bytes", f"a length of {header_size}")
    raw = file.read(header_size)
    if len(raw) < header_size:
        raise file_error(path, f"at least {8 + header_size} bytes, header included", f"{file_size} bytes (truncated)")
    try:
        header = json.loads(raw.decode(), object_pairs_hook=object_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise file_error(path, "a header in JSON", f"{type(error).__name__}: {error}") from error
    if not isinstance(header, dict):
        raise file_error(path, "a header that is a JSON object", type(header).__name__)
    header.pop("__metadata__", None)
    start = 8 + header_size
    tensors = {name: _parse(name, entry, mapped, start) for name, entry in header.items()}
    _check_layout(tensors, mapped, start)
    return tensors


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse(name: str, entry: Any, mapped: MappedFile, start: int) -> StoredRows:
    path = mapped.path
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if (
        not isinstance(dtype, str)
        or not (isinstance(shape, list) and all(map(_is_size, shape)))
        or not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets)))
        or offsets[0] > offsets[1]
    ):
        raise tensor_error(name, path, "dtype, shape and two ascending data_offsets in the header", entry)
    begin, end = start + offsets[0], start + offsets[1]
    if end > mapped.size:
        raise tensor_error(name, path, f"a file of at least {end} bytes", f"{mapped.size} bytes (truncated)")
    if dtype in ITEM_SIZE and math.prod(shape) * ITEM_SIZE[dtype] != end - begin:
        needed = math.prod(shape) * ITEM_SIZE[dtype]
        raise tensor_error(name, path, f"{needed} bytes for {dtype} {shape}", f"{end - begin} bytes")
    return StoredRows(name, path, dtype, tuple(shape), end - begin, mapped, begin)


def _check_layout(tensors: dict[str, StoredRows], mapped: MappedFile, start: int) -> None:
    path, at = mapped.path, start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != at:
            what = "overlaps another tensor" if tensor.begin < at else "follows a gap"
            raise tensor_error(
                tensor.stored_name,
                path,
                f"data at byte {at}, where the tensor before it ends",
                f"data at byte {tensor.begin}, which {what}",
            )
        at = tensor.end
    if at != mapped.size:
        raise file_error(path, f"{at} bytes, where the last tensor ends", f"{mapped.size} bytes")
