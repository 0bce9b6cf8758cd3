"""The wire codec of messages that carry a tensor: torch <-> `grokmoe.v1.Tensor`, with one copy out and none in.

A data-plane message has its tensor in field 15, `payload`; all else is a small header. Letting protobuf copy
megabytes costs more than sending them (docs/protocol.md), so here the header goes through protobuf and the tensor's
memory is joined to it by hand. The bytes are those protobuf would produce and any protobuf client can read them.

A payload too large for one message is cut by rows: every message holds a complete Tensor, and `remaining_rows` says
how many rows are still to come. `encode_rows` cuts, `RowAssembler` joins.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from google.protobuf.message import DecodeError, Message

from grokmoe.errors import InvalidRequest
from grokmoe.v1 import tensor_pb2

MAX_CHUNK_BYTES = 2 * 1024 * 1024
"""Largest tensor in one message. Beyond it page faults of fresh buffers cost more than a second message."""

MAX_UNFINISHED = 8
"""Ids of one stream whose later parts are still to come. Beyond it the oldest is dropped: a caller that gave up in
the middle of a request leaves one behind, and a caller that works writes one request after another."""

MAX_DIMS = 8
"""Dimensions of a tensor. Nobody sends more, and the product of a million extents is a long computation."""

MAX_REFUSED = 1024
"""Ids of one stream remembered because later parts of a refused request must be passed over."""

PAYLOAD_FIELD = 15
_PAYLOAD_TAG = (PAYLOAD_FIELD << 3) | 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_EXTENT = 2**32 - 1

_TORCH_BY_WIRE: dict[int, torch.dtype] = {
    tensor_pb2.DATA_TYPE_FLOAT32: torch.float32,
    tensor_pb2.DATA_TYPE_BFLOAT16: torch.bfloat16,
}
_WIRE_BY_TORCH: dict[torch.dtype, Any] = {dtype: wire for wire, dtype in _TORCH_BY_WIRE.items()}
assert set(_TORCH_BY_WIRE) == set(tensor_pb2.DataType.values()) - {tensor_pb2.DATA_TYPE_UNSPECIFIED}

with warnings.catch_warnings():
    # torch warns once per process that memory of `bytes` is read-only. Received tensors are never written to.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)

M = TypeVar("M", bound=Message)


def wire_dtype(dtype: torch.dtype) -> Any:
    """The enum value of a torch type. KeyError for a type that has no codec."""
    return _WIRE_BY_TORCH[dtype]


def torch_dtype(wire: int, field: str = "payload") -> torch.dtype:
    """The torch type of an enum value. InvalidRequest, naming what of `field` it is, for a value that has no codec."""
    try:
        return _TORCH_BY_WIRE[wire]
    except KeyError:
        known = ", ".join(tensor_pb2.DataType.Name(value) for value in _TORCH_BY_WIRE)
        raise InvalidRequest(f"{field}.dtype", f"is {wire}, must be one of {known}") from None


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append((value & 0x7F) | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError


def encode(header: Message, tensor: torch.Tensor | None = None) -> bytes:
    """Serialises a message with `tensor` as its payload.

    header: a data-plane message whose `payload` is unset.
    tensor: any shape, float32 or bfloat16; copied once, into the result.
    """
    head = header.SerializeToString()
    if tensor is None:
        return head
    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    shape = b"".join(map(_varint, tensor.shape))
    tensor_head = b"".join(
        (
            b"\x08",
            _varint(wire_dtype(tensor.dtype)),
            b"\x12",
            _varint(len(shape)),
            shape,
            b"\x1a",
            _varint(flat.nbytes),
        )
    )
    size = _varint(len(tensor_head) + flat.nbytes)
    return b"".join((head, bytes((_PAYLOAD_TAG,)), size, tensor_head, flat.data))


def _fields(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Walks one message: (field number, wire type, start of the tag, start of the value, end of the value)."""
    at = begin
    while at < end:
        start = at
        tag, at = _read_varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, (_, at) = at, _read_varint(data, at)
        elif kind == _BYTES:
            length, value = _read_varint(data, at)
            at = value + length
        elif kind in (_FIXED32, _FIXED64):
            value, at = at, at + (4 if kind == _FIXED32 else 8)
        else:
            raise IndexError
        if at > end or number == 0:
            raise IndexError
        yield number, kind, start, value, at


def _decode_tensor(data: bytes, begin: int, end: int) -> torch.Tensor:
    wire, at, size = 0, begin, 0
    shape: list[int] = []
    for number, kind, _, value, stop in _fields(data, begin, end):
        if len(shape) > MAX_DIMS:
            break
        if number == 1 and kind == _VARINT:
            wire = _read_varint(data, value)[0]
        elif number == 2 and kind == _BYTES:
            while value < stop and len(shape) <= MAX_DIMS:
                extent, value = _read_varint(data, value)
                shape.append(extent)
        elif number == 2 and kind == _VARINT:  # an unpacked repeated field is legal, too
            shape.append(_read_varint(data, value)[0])
        elif number == 3 and kind == _BYTES:
            at, size = value, stop - value
    return _as_tensor("payload", wire, shape, data, at, size)


def _as_tensor(field: str, wire: int, shape: Sequence[int], data: bytes, at: int, size: int) -> torch.Tensor:
    """The tensor in `size` bytes from `at` on. Raises InvalidRequest, naming what of `field` is wrong."""
    if len(shape) > MAX_DIMS:
        raise InvalidRequest(f"{field}.shape", f"has more than {MAX_DIMS} dimensions")
    if max(shape, default=0) > _MAX_EXTENT:
        raise InvalidRequest(f"{field}.shape", f"holds {max(shape)}, must be at most {_MAX_EXTENT}")
    dtype = torch_dtype(wire, field)
    count = math.prod(shape)
    if size != count * dtype.itemsize:
        needed = count * dtype.itemsize
        raise InvalidRequest(f"{field}.data", f"has {size} bytes, shape {list(shape)} of {dtype} needs {needed}")
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=at).reshape(tuple(shape))


def _parse(kind: type[M], data: bytes) -> tuple[M, tuple[int, int] | None]:
    """The message without its payload, and where in `data` that lies. InvalidRequest if it is no such message."""
    header, span, kept = [], None, 0
    message = kind()
    try:
        for number, wire, start, value, end in _fields(data, 0, len(data)):
            if number == PAYLOAD_FIELD and wire == _BYTES:
                header.append(data[kept:start])
                kept = end
                span = value, end
        header.append(data[kept:])
        message.ParseFromString(b"".join(header))
    except (IndexError, DecodeError, RuntimeError) as error:
        raise _malformed("", kind.DESCRIPTOR.full_name, error) from error
    return message, span


def _payload(data: bytes, span: tuple[int, int] | None) -> torch.Tensor | None:
    try:
        return None if span is None else _decode_tensor(data, *span)
    except (IndexError, RuntimeError, TypeError) as error:  # the last two: extents beyond what torch can hold
        raise _malformed("payload", "grokmoe.v1.Tensor", error) from error


def _malformed(field: str, name: str, error: Exception) -> InvalidRequest:
    # The first line: torch's messages go on with a stack trace.
    reason = (str(error) or "malformed field").splitlines()[0]
    return InvalidRequest(field, f"not a {name}: {reason}")


def decode(kind: type[M], data: bytes) -> tuple[M, torch.Tensor | None]:
    """Parses a message; its payload comes back as a tensor that shares the message's memory.

    The tensor must not be written to. The returned message has no payload.
    Raises InvalidRequest when the bytes are no such message, or dtype, shape and length of the payload disagree.
    """
    message, span = _parse(kind, data)
    return message, _payload(data, span)


def from_message(message: tensor_pb2.Tensor, field: str) -> torch.Tensor:
    """A tensor that is no payload but a field of an ordinary message. It must not be written to.

    Raises InvalidRequest, naming what of `field` it is, when dtype, shape and length of the data disagree.
    """
    data = message.data
    try:
        return _as_tensor(field, message.dtype, message.shape, data, 0, len(data))
    except (RuntimeError, TypeError) as error:  # extents beyond what torch can hold
        raise _malformed(field, "grokmoe.v1.Tensor", error) from error


def encode_rows(header: Any, rows_ND: torch.Tensor, id_field: str, max_bytes: int = MAX_CHUNK_BYTES) -> Iterator[bytes]:
    """Serialises a message whose payload may be too large for one, cut by rows.

    header: goes out whole with the first rows; the later messages repeat only its field `id_field`.
    rows_ND: two-dimensional; no rows give one message.
    """
    num_rows = rows_ND.shape[0]
    per_message = max(1, max_bytes // max(1, rows_ND.shape[1] * rows_ND.element_size()))
    for begin in range(0, max(num_rows, 1), per_message):
        if begin:
            header = type(header)(**{id_field: getattr(header, id_field)})
        part = rows_ND[begin : begin + per_message]
        header.remaining_rows = num_rows - begin - part.shape[0]
        yield encode(header, part)


class RowAssembler(Generic[M]):
    """Joins the messages of `encode_rows`, for one stream.

    Memory is bounded: at most `max_rows` rows, `width` wide if that is given, for each of MAX_UNFINISHED ids.
    """

    def __init__(self, kind: type[M], id_field: str, max_rows: int, width: int | None = None) -> None:
        self._kind = kind
        self._id_field = id_field
        self._max_rows = max_rows
        self._width = width
        self._open: dict[int, tuple[M, torch.Tensor, int]] = {}
        self._refused: set[int] = set()
        self.failed_id: int | None = None

    def add(self, data: bytes) -> tuple[M, torch.Tensor | None] | None:
        """Takes one message. Returns the whole (header, payload) with its last part, None before.

        Raises InvalidRequest for bytes that are no message, parts that do not fit together, or too many rows. The
        unfinished parts of that id are dropped then, those still to come are passed over, and `failed_id` names it;
        None when the bytes are no message.
        """
        self.failed_id = None
        message, span = _parse(self._kind, data)
        key = getattr(message, self._id_field)
        if key in self._refused:
            is_later_part = all(field.name in (self._id_field, "remaining_rows") for field, _ in message.ListFields())
            if is_later_part and message.remaining_rows:  # type: ignore[attr-defined]
                return None
            self._refused.discard(key)
            if is_later_part:
                return None
        try:
            return self._join(key, message, _payload(data, span))
        except InvalidRequest:
            self._open.pop(key, None)
            self.failed_id = key
            if message.remaining_rows and len(self._refused) < MAX_REFUSED:  # type: ignore[attr-defined]
                self._refused.add(key)
            raise

    def _join(self, key: int, message: Any, part: torch.Tensor | None) -> tuple[M, torch.Tensor | None] | None:
        remaining = message.remaining_rows
        if key not in self._open and not remaining:
            return message, part
        if part is None or part.dim() != 2 or not part.shape[0]:
            raise InvalidRequest("payload", "a message that is one part of several must hold rows [rows, width]")
        if key not in self._open:
            total = part.shape[0] + remaining
            if total > self._max_rows:
                raise InvalidRequest("remaining_rows", f"makes {total} rows in all, limit is {self._max_rows}")
            if self._width is not None and part.shape[1] != self._width:
                raise InvalidRequest("payload.shape", f"is {list(part.shape)}, rows must be {self._width} wide")
            if len(self._open) == MAX_UNFINISHED:
                del self._open[next(iter(self._open))]
            whole = torch.empty(total, part.shape[1], dtype=part.dtype)
            self._open[key] = (message, whole, 0)
        first, whole, filled = self._open[key]
        end = filled + part.shape[0]
        if part.shape[1:] != whole.shape[1:] or part.dtype != whole.dtype:
            raise InvalidRequest("payload", f"part is {part.dtype} x {part.shape[1]}, the first was another")
        if end + remaining != whole.shape[0]:
            raise InvalidRequest(
                "remaining_rows",
                f"is {remaining} after {end} rows, the first message announced {whole.shape[0]}",
            )
        whole[filled:end] = part
        if remaining:
            self._open[key] = (first, whole, end)
            return None
        del self._open[key]
        return first, whole
