"""Ranges of experts as a caller names them -> cells."""

from __future__ import annotations

from collections.abc import Sequence

from expert_worker.cells import Cells
from grokmoe.errors import InvalidRequest


def check_ranges(asked: Sequence[tuple[int, int, int]], num_experts: int, num_layers: int) -> Cells:
    """The cells of ranges (expert, first layer, one past the last). Ranges may overlap.

    Raises InvalidRequest with the path of the field, such as `experts[1].layer_end`.
    """
    if not asked:
        raise InvalidRequest("experts", "is empty, must have at least one range")
    most = num_experts * num_layers  # each of one layer: more can only say the same again
    if len(asked) > most:
        raise InvalidRequest("experts", f"has {len(asked)} ranges, limit is {most}")
    for index, (expert, begin, end) in enumerate(asked):
        path = f"experts[{index}]"
        if expert >= num_experts:
            raise InvalidRequest(f"{path}.expert", f"is {expert}, the model has experts 0 to {num_experts - 1}")
        if end > num_layers:
            raise InvalidRequest(f"{path}.layer_end", f"is {end}, the model has {num_layers} layers")
        if end <= begin:
            raise InvalidRequest(f"{path}.layer_end", f"is {end}, must be more than layer_begin, which is {begin}")
    return frozenset((layer, expert) for expert, begin, end in asked for layer in range(begin, end))
