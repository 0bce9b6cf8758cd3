"""Ranges of units as a caller names them -> cells."""

from __future__ import annotations

from collections.abc import Sequence

from expert_worker.cells import Cells
from grokmoe.errors import InvalidRequest
from grokmoe.expert_ranges import ExpertLayers, pairs_of
from grokmoe.expert_units import SLICE_MULTIPLE, expert_of, num_slices_of, slicing_fault


def check_ranges(asked: Sequence[ExpertLayers], num_experts: int, num_layers: int, ffn_size: int) -> Cells:
    """The cells of ranges (unit, first layer, one past the last). Ranges may overlap.

    Raises InvalidRequest with the path of the field, such as `experts[1].layer_end`.
    """
    if not asked:
        raise InvalidRequest("experts", "is empty, must have at least one range")
    most = num_experts * num_layers  # each of one layer: more can only say the same again
    if any(num_slices_of(unit) > 1 for unit, _, _ in asked):
        most *= max(1, ffn_size // SLICE_MULTIPLE)
    if len(asked) > most:
        raise InvalidRequest("experts", f"has {len(asked)} ranges, limit is {most}")
    for index, (unit, begin, end) in enumerate(asked):
        path, expert = f"experts[{index}]", expert_of(unit)
        if expert >= num_experts:
            raise InvalidRequest(f"{path}.expert", f"is {expert}, the model has experts 0 to {num_experts - 1}")
        if end > num_layers:
            raise InvalidRequest(f"{path}.layer_end", f"is {end}, the model has {num_layers} layers")
        if end <= begin:
            raise InvalidRequest(f"{path}.layer_end", f"is {end}, must be more than layer_begin, which is {begin}")
        if fault := slicing_fault(num_slices_of(unit), ffn_size):
            raise InvalidRequest(f"{path}.num_slices", fault)
    return frozenset(pairs_of(asked))
