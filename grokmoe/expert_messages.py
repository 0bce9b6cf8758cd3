"""Ranges of units as messages, and units as the entries of a ForwardRequest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from grokmoe.errors import InvalidRequest
from grokmoe.expert_ranges import ExpertLayers
from grokmoe.expert_units import FIRST_SLICE, MAX_EXPERT, MAX_SLICES, slice_of, unit_of
from grokmoe.v1.expert_pb2 import ExpertRange, ForwardRequest


class RangeMessage(Protocol):
    """An ExpertRange."""

    expert: int
    layer_begin: int
    layer_end: int
    slice: int
    num_slices: int


def to_messages(ranges: Iterable[ExpertLayers]) -> list[ExpertRange]:
    """As they travel. Of whole experts nothing is said of slices."""
    messages = []
    for unit, begin, end in ranges:
        expert, index, count = slice_of(unit)
        message = ExpertRange(expert=expert, layer_begin=begin, layer_end=end)
        if count > 1:
            message.slice, message.num_slices = index, count
        messages.append(message)
    return messages


def from_messages(messages: Sequence[RangeMessage], path: str = "experts") -> list[ExpertLayers]:
    """As they are meant. Raises InvalidRequest, with the field below `path`, for a slice that no expert has."""
    return [
        (
            _checked_unit(each.expert, each.slice, each.num_slices or 1, f"{path}[{index}]"),
            each.layer_begin,
            each.layer_end,
        )
        for index, each in enumerate(messages)
    ]


def _checked_unit(expert: int, index: int, count: int, path: str) -> int:
    if expert > MAX_EXPERT:
        raise InvalidRequest(f"{path}.expert", f"is {expert}, must be at most {MAX_EXPERT}")
    if count > MAX_SLICES:
        raise InvalidRequest(f"{path}.num_slices", f"is {count}, must be at most {MAX_SLICES}")
    if index >= count:
        raise InvalidRequest(f"{path}.slice", f"is {index}, of {count} slices")
    return unit_of(expert, index, count)


def name_units(request: ForwardRequest, units: Sequence[int]) -> None:
    """Writes which units the rows are for. units: ascending."""
    if not units or units[-1] < FIRST_SLICE:
        request.expert_ids.extend(units)
        return
    for expert, index, count in map(slice_of, units):
        request.expert_ids.append(expert)
        request.slices.append(index)
        request.num_slices.append(count)


def named_units(request: ForwardRequest) -> tuple[int, ...]:
    """Reads them. Raises InvalidRequest, naming the field, for what no expert has."""
    if not request.num_slices and not request.slices:
        return tuple(request.expert_ids)
    num_entries = len(request.expert_ids)
    for field in ("slices", "num_slices"):
        if len(getattr(request, field)) != num_entries:
            given = len(getattr(request, field))
            raise InvalidRequest(field, f"has {given} entries for {num_entries} expert_ids")
    units = []
    for expert, index, count in zip(request.expert_ids, request.slices, request.num_slices, strict=True):
        if expert > MAX_EXPERT:
            raise InvalidRequest("expert_ids", f"has {expert}, must be at most {MAX_EXPERT}")
        if not 1 <= count <= MAX_SLICES:
            raise InvalidRequest("num_slices", f"has {count}, must be from 1 to {MAX_SLICES}")
        if index >= count:
            raise InvalidRequest("slices", f"has {index}, of {count} slices")
        units.append(unit_of(expert, index, count))
    return tuple(units)
