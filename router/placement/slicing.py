"""Into how many slices the experts of a layer are cut: what their holders say, and which of it is used.

An expert's bits depend on the number of its slices, so one number is used at a time: the smallest for which a ready
worker holds every slice. Where holders differ, an expert that was whole is served by slices when its holder is lost,
and the other way round.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from grokmoe.expert_units import expert_of, num_slices_of, slice_of, units_of

Slicings = Mapping[int, Sequence[Sequence[int]]]
"""Of one expert: number of slices -> per slice the workers that hold it."""


def slicings_of(holders: Mapping[int, Sequence[int]]) -> dict[int, Slicings]:
    """expert -> its slicings. holders: of one layer, unit -> workers."""
    found: dict[int, dict[int, list[Sequence[int]]]] = {}
    for unit, workers in holders.items():
        expert, index, num_slices = slice_of(unit)
        found.setdefault(expert, {}).setdefault(num_slices, [()] * num_slices)[index] = workers
    return dict(found)


def is_held(pairs: Collection[tuple[int, int]], layer: int, unit: int) -> bool:
    """Whether these (layer, unit) pairs have the unit's expert, whole or in any number of slices."""
    expert = expert_of(unit)
    counts = {num_slices_of(other) for at, other in pairs if at == layer and expert_of(other) == expert}
    return any(all((layer, each) in pairs for each in units_of(expert, count)) for count in counts)


def is_complete(slices: Sequence[Sequence[int]], workers: Collection[int]) -> bool:
    """Whether these workers hold every slice."""
    return all(any(holder in workers for holder in holders) for holders in slices)


def choose_slicing(slicings: Slicings, ready: Collection[int], preferred: int | None = None) -> int:
    """The number of slices to use.

    ready: workers in use; without any that is complete the workers that are away decide, who may come back.
    preferred: what a table from outside names; it comes before all others that are as good.
    """

    def rank(num_slices: int) -> tuple[bool, bool, bool, int]:
        slices = slicings[num_slices]
        return not is_complete(slices, ready), not all(slices), num_slices != preferred, num_slices

    return min(slicings, key=rank)
