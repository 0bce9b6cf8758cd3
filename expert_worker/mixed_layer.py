"""A layer whose experts are cut into slices of several widths, some perhaps not at all.

A slice is an expert with a narrower ffn dimension: its kernel need not know. So slices that are as wide as one another
are the `LayerWeights` of a model that is as narrow, and a layer of one width is nothing but that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import torch

from expert_worker.layer import Layer, LayerWeights
from expert_worker.matrix import Matrix
from grokmoe.expert_units import num_slices_of
from grokmoe.model_config import ModelConfig
from grokmoe.tensor_names import ExpertLinear

NewLayer = Callable[[int], LayerWeights]
"""A layer without experts, for slices of so many to an expert."""


def narrowed(config: ModelConfig, num_slices: int) -> ModelConfig:
    """The model whose experts are as wide as one of so many slices."""
    if num_slices == 1:
        return config
    return dataclasses.replace(config, intermediate_size=config.intermediate_size // num_slices)


def resized(old: Layer, units: Sequence[int], new: NewLayer) -> Layer:
    """These units, ascending: with the weights they have in `old`; the others are to be put before they are called.

    Raises what torch raises when there is no memory.
    """
    parts = _parts(old)
    wanted: dict[int, LayerWeights] = {}
    for num_slices, group in groupby(units, key=num_slices_of):
        part, these = parts.get(num_slices) or new(num_slices), tuple(group)
        wanted[num_slices] = part if part.expert_ids == these else part.resized(these)
    if len(wanted) > 1:
        return MixedLayer(wanted)
    if wanted:
        return next(iter(wanted.values()))
    return parts[1].resized(()) if 1 in parts else new(1)


def _parts(layer: Layer) -> Mapping[int, LayerWeights]:
    if isinstance(layer, MixedLayer):
        return layer.parts
    assert isinstance(layer, LayerWeights)
    return {num_slices_of(layer.expert_ids[0]) if layer.expert_ids else 1: layer}


class MixedLayer(Layer):
    """parts: by the number of slices, ascending; at least two."""

    def __init__(self, parts: Mapping[int, LayerWeights]) -> None:
        first = next(iter(parts.values()))
        super().__init__(first.dtype, first.device, [unit for part in parts.values() for unit in part.expert_ids])
        self.parts = parts

    def put(self, expert: int, linear: ExpertLinear, weight: torch.Tensor) -> None:
        """See Layer."""
        self.parts[num_slices_of(expert)].put(expert, linear, weight)

    def fill(self, expert: int, linear: ExpertLinear, matrix: Matrix) -> None:
        """See Layer."""
        self.parts[num_slices_of(expert)].fill(expert, linear, matrix)

    @property
    def takes_fp8(self) -> bool:
        """See Layer."""
        return next(iter(self.parts.values())).takes_fp8

    def forward(self, expert_ids: Sequence[int], counts: Sequence[int], rows_ND: torch.Tensor) -> torch.Tensor:
        """See Layer. Rows for slices of one width are next to each other, since units ascend."""
        outs_ND = []
        begin = row = 0
        for num_slices, group in groupby(expert_ids, key=num_slices_of):
            end = begin + sum(1 for _ in group)
            num_rows = sum(counts[begin:end])
            if num_rows:
                part, rows = self.parts[num_slices], rows_ND[row : row + num_rows]
                outs_ND.append(part.forward(expert_ids[begin:end], counts[begin:end], rows))
            begin, row = end, row + num_rows
        if len(outs_ND) == 1:
            return outs_ND[0]
        return torch.cat(outs_ND) if outs_ND else torch.empty_like(rows_ND)
