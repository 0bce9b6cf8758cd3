"""Messages nobody would write: any field at any value, extreme ones above all, and bytes that are no message."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import strategies as st

MAX_ITEMS = 4

_INTS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_TEXTS = st.sampled_from(["", "\0", "\ud7ff\U0010ffff", "../../etc/passwd", "{}", "(a+)+$", "x" * 300]) | st.text(
    max_size=20
)


def _ints(low: int, high: int) -> st.SearchStrategy[int]:
    return st.sampled_from([low, high, 0, 1, high - 1]) | st.integers(max(low, -3), 300) | st.integers(low, high)


def _values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    kind = field.cpp_type
    if kind in _INTS:
        return _ints(*_INTS[kind])
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return st.sampled_from([value.number for value in field.enum_type.values] + [-1, 77])
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return st.sampled_from([0.0, -0.0, 1.0, 0.5, -1.0, 1e-45]) | st.floats(width=32)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return st.binary(max_size=64) if field.type == FieldDescriptor.TYPE_BYTES else _TEXTS
    return messages(field.message_type, depth - 1)


def messages(descriptor: Descriptor, depth: int = 4) -> st.SearchStrategy[Any]:
    """Messages of a type with any of its fields set, nested ones to some depth."""
    from google.protobuf import message_factory

    kind = message_factory.GetMessageClass(descriptor)
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for field in descriptor.fields:
        if field.message_type is not None and depth <= 0:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            fields[field.name] = st.dictionaries(
                _values(entry["key"], 0), _values(entry["value"], depth), max_size=MAX_ITEMS
            )
        elif field.is_repeated:
            fields[field.name] = st.lists(_values(field, depth), max_size=MAX_ITEMS)
        else:
            fields[field.name] = _values(field, depth)
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: kind(**_one_of_each(descriptor, values)))


def _one_of_each(descriptor: Descriptor, values: dict[str, Any]) -> dict[str, Any]:
    """Of a oneof only one can be set."""
    taken: set[str] = set()
    kept = {}
    for name, value in values.items():
        oneof = descriptor.fields_by_name[name].containing_oneof
        if oneof is not None and oneof.name in taken:
            continue
        if oneof is not None:
            taken.add(oneof.name)
        kept[name] = value
    return kept


@st.composite
def mutated(draw: st.DrawFn, valid: st.SearchStrategy[bytes]) -> bytes:
    """Bytes of a message with some of them changed, taken out, put in, or cut off."""
    data = bytearray(draw(valid))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        what = draw(st.sampled_from(["change", "cut", "insert", "remove", "repeat"]))
        if what == "change" and data:
            data[at] = draw(st.integers(0, 255))
        elif what == "cut":
            del data[at:]
        elif what == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        elif what == "remove":
            del data[at : at + draw(st.integers(1, 8))]
        elif what == "repeat":
            data[at:at] = data[at : at + 16] * draw(st.integers(1, 50))
    return bytes(data)


def wire(descriptor: Descriptor) -> st.SearchStrategy[bytes]:
    """Bytes as they may arrive: a message, one that was damaged, or anything."""
    whole = messages(descriptor).map(lambda message: message.SerializeToString())
    return whole | mutated(whole) | st.binary(max_size=200)
