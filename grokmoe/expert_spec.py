"""The words that say which experts are meant, and in which layers: one grammar for flags, files and commands.

    spec    = group, joined by +
    group   = experts[:slices/count][@layers]
    experts, slices, layers = numbers and ranges a-b, both ends included, joined by commas; or all

Slices count from 1, so 3:1/2 and 3:2/2 are the two halves of expert 3. Without slices whole experts are meant, without
layers all of them: `0-3:1/2@0-31+4,6` is the first half of experts 0 to 3 in layers 0 to 31, and experts 4 and 6.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from grokmoe.errors import ConfigError
from grokmoe.expert_ranges import ExpertLayers, pairs_of
from grokmoe.expert_units import MAX_SLICES, slice_of, unit_of

ALL = "all"
NONE = "none"
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)
_COUNT = re.compile(r"\d{1,9}", re.ASCII)

Spans = tuple[tuple[int, int], ...]
"""(first, last)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """experts, layers: None: all of them. slices: ascending, from 0; of `count`."""

    experts: Spans | None
    slices: tuple[int, ...]
    count: int
    layers: Spans | None


def parse_groups(spec: str) -> list[Group]:
    """Raises ConfigError for what is malformed. What the model has is not looked at."""
    groups = []
    for text in spec.split("+"):
        words, at, layers = text.partition("@")
        experts, colon, slices = words.partition(":")
        parsed = _parse_spans(spec, experts, "expert")
        which, count = _parse_slices(spec, slices) if colon else ((0,), 1)
        groups.append(Group(parsed, which, count, _parse_spans(spec, layers, "layer") if at else None))
    return groups


def parse_experts(spec: str, num_experts: int, num_layers: int) -> dict[int, tuple[int, ...]]:
    """What a specification names, as layer -> units (`grokmoe.expert_units`), both ascending.

    What several groups name is held once. `none` alone is none.
    Raises ConfigError for what is malformed or outside the model; whether the model's experts can be cut like that,
    `check_slicing` says.
    """
    held: defaultdict[int, set[int]] = defaultdict(set)
    if spec.strip() == NONE:
        return {}
    for group in parse_groups(spec):
        experts = _numbers(spec, group.experts, "expert", num_experts)
        units = {unit_of(expert, index, group.count) for expert in experts for index in group.slices}
        for layer in _numbers(spec, group.layers, "layer", num_layers):
            held[layer] |= units
    return {layer: tuple(sorted(held[layer])) for layer in sorted(held)}


def _parse_spans(spec: str, text: str, what: str) -> Spans | None:
    if text.strip() == ALL:
        return None
    spans = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"experts is {spec!r}: {part.strip()!r} is no {what} number, no range a-b, not '{ALL}'")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise ConfigError(f"experts is {spec!r}: the range {part.strip()!r} is empty")
        spans.append((first, last))
    return tuple(spans)


def _parse_slices(spec: str, text: str) -> tuple[tuple[int, ...], int]:
    numbers, slash, count_text = text.partition("/")
    if not slash or not _COUNT.fullmatch(count_text.strip()):
        raise ConfigError(f"experts is {spec!r}: {text.strip()!r} is no slice such as 1/2")
    count = int(count_text)
    if not 1 <= count <= MAX_SLICES:
        raise ConfigError(f"experts is {spec!r}: {count} slices of an expert, must be from 1 to {MAX_SLICES}")
    spans = _parse_spans(spec, numbers, "slice") or ((1, count),)
    for first, last in spans:
        if first < 1 or last > count:
            wrong = first if first < 1 else last
            raise ConfigError(f"experts is {spec!r}: of {count} slices there are 1 to {count}, there is no {wrong}")
    return tuple(sorted({number - 1 for first, last in spans for number in range(first, last + 1)})), count


def _numbers(spec: str, spans: Spans | None, what: str, limit: int) -> Iterable[int]:
    if spans is None:
        return range(limit)
    for _, last in spans:
        if last >= limit:
            raise ConfigError(f"experts is {spec!r}: the model has {what}s 0 to {limit - 1}, there is no {last}")
    return {number for first, last in spans for number in range(first, last + 1)}


def describe_ranges(ranges: Iterable[ExpertLayers]) -> str:
    """The specification that means these ranges, such as `0-3@0-31+4:1/2@32-63`; none: there are none."""
    layers_of: defaultdict[int, list[int]] = defaultdict(list)
    for layer, unit in sorted(pairs_of(ranges)):
        layers_of[unit].append(layer)
    units_of: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for unit, layers in sorted(layers_of.items()):
        units_of[tuple(layers)].append(unit)
    words = [f"{text}@{spans(layers)}" for layers, units in sorted(units_of.items()) for text in _texts(units)]
    return "+".join(words) or NONE


def describe_units(units: Iterable[int]) -> str:
    """The same of one layer, without it: `0-3,7+4:1/2`."""
    return "+".join(_texts(sorted(units))) or NONE


def _texts(units: Iterable[int]) -> list[str]:
    """units: ascending. Experts of which the same slices are there share a text."""
    slices_of: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for unit in units:
        expert, index, count = slice_of(unit)
        slices_of[count, expert].append(index + 1)
    experts_of: defaultdict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
    for (count, expert), slices in slices_of.items():
        experts_of[count, tuple(slices)].append(expert)
    return [
        spans(sorted(experts)) + (f":{spans(slices)}/{count}" if count > 1 else "")
        for (count, slices), experts in sorted(experts_of.items())
    ]


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers: 0-3,7."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in found)
