"""What has a place in a layer: an expert, or a slice of one. Their numbers, and how an expert can be cut.

Slice i of K holds rows [i F / K, (i + 1) F / K) of an expert's `linear` and `linear_v`, and the same columns of its
`linear_1` (F ffn). Between them lies an elementwise product, so a slice needs nothing of the others, and its output is
one of K parts that sum to the expert's (docs/decisions/0019).

Both are *units*, and a unit is a number. That of a whole expert is the expert's own: where nothing is sliced, there
is nothing to see of slices. In ascending order whole experts come first, and slices that are as wide as one another
are next to each other.
"""

from __future__ import annotations

from typing import NamedTuple

from grokmoe.errors import ConfigError

MAX_SLICES = 1024
"""Of an expert: Grok-1's, cut into pieces of SLICE_MULTIPLE."""

SLICE_MULTIPLE = 32
"""What the width of a slice is a multiple of, so that every kernel takes it as it takes a whole expert: panels of 32
outputs on a CPU (`grokmoe.panels`), rows of 16 bytes for the copy engine of a GPU. One rule for all of them, or a
slice could be loaded on one worker and not on the next."""

FIRST_SLICE = 1 << 32
"""Units from here on are slices."""

MAX_EXPERT = (1 << 16) - 1
"""Highest number of an expert."""

_BITS = 16
_MASK = (1 << _BITS) - 1


class Slice(NamedTuple):
    """A unit taken apart. A whole expert is slice 0 of 1."""

    expert: int
    slice: int
    num_slices: int


def unit_of(expert: int, index: int = 0, count: int = 1) -> int:
    """The number of slice `index` of `count` of an expert."""
    assert 0 <= expert <= _MASK, expert
    assert 0 <= index < count <= MAX_SLICES, (index, count)
    return (count - 1) << 2 * _BITS | index << _BITS | expert


def slice_of(unit: int) -> Slice:
    """What a number means."""
    return Slice(unit & _MASK, unit >> _BITS & _MASK, (unit >> 2 * _BITS) + 1)


def expert_of(unit: int) -> int:
    """The expert that a unit is, or is a slice of."""
    return unit & _MASK


def num_slices_of(unit: int) -> int:
    """Into how many slices its expert is cut; 1: it is whole."""
    return (unit >> 2 * _BITS) + 1


def units_of(expert: int, count: int) -> tuple[int, ...]:
    """All slices of an expert, in order."""
    return tuple(unit_of(expert, index, count) for index in range(count))


def describe_unit(unit: int) -> str:
    """In the words of every flag and file: 3, or 3:1/2 for the first of two slices."""
    if unit < FIRST_SLICE:
        return str(unit)
    expert, index, count = slice_of(unit)
    return f"{expert}:{index + 1}/{count}"


def slicing_fault(count: int, ffn_size: int) -> str:
    """Why an expert cannot be cut into so many slices; empty: it can."""
    if count < 1 or count > MAX_SLICES:
        return f"is {count}, must be from 1 to {MAX_SLICES}"
    if count > 1 and ffn_size % count:
        return f"is {count}, which does not divide the ffn dimension {ffn_size}"
    if count > 1 and ffn_size // count % SLICE_MULTIPLE:
        width, least = ffn_size // count, SLICE_MULTIPLE
        return f"is {count}: slices {width} wide of the ffn dimension {ffn_size}, must be a multiple of {least}"
    return ""


def check_slicing(name: str, count: int, ffn_size: int) -> None:
    """Raises ConfigError, naming what says so, when an expert cannot be cut like that."""
    fault = slicing_fault(count, ffn_size)
    if fault:
        raise ConfigError(f"{name} {fault}")
