"""What the experts of one layer are to everybody but their kernel: some experts, and rows through them.

Shapes: N rows, E experts of the layer held here, D hidden, F ffn.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Self

import torch

from expert_worker.matrix import Matrix
from grokmoe.tensor_names import ExpertLinear


class Layer(abc.ABC):
    """Some experts of one layer, or slices of them (`grokmoe.expert_units`), and rows through them.

    Nobody changes one that others can see: experts come and go with another one. So whoever has one in hand computes
    with what it found there, whatever is loaded or given up meanwhile.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, expert_ids: Sequence[int] = ()) -> None:
        """expert_ids: units, ascending."""
        self.dtype, self.device = dtype, device
        self.expert_ids = tuple(expert_ids)
        self._index = {expert: index for index, expert in enumerate(self.expert_ids)}

    def holds(self, expert: int) -> bool:
        """Whether it has the expert."""
        return expert in self._index

    @abc.abstractmethod
    def put(self, expert: int, linear: ExpertLinear, weight: torch.Tensor) -> None:
        """Takes one matrix of an expert, [out, in] as in the checkpoint, in the layer's type. Keeps no reference.

        Of a slice: its part of the matrix.
        """

    def fill(self, expert: int, linear: ExpertLinear, matrix: Matrix) -> None:
        """The same of a matrix that is not in memory. Raises what its pieces do."""
        self.put(expert, linear, matrix.whole())

    @property
    def takes_fp8(self) -> bool:
        """Whether pieces of a matrix may be in float8_e4m3fn, with scales."""
        return False

    @abc.abstractmethod
    def forward(self, expert_ids: Sequence[int], counts: Sequence[int], rows_ND: torch.Tensor) -> torch.Tensor:
        """Rows through their experts' MLPs.

        expert_ids: strictly ascending. counts: rows of each; rows_ND is sorted in that order.
        Returns: out_ND, new, on the rows' device.
        """


class LayerWeights(Layer):
    """Experts, or slices of them, that are equally wide: in the layout of one kernel."""

    @abc.abstractmethod
    def resized(self, expert_ids: Sequence[int]) -> Self:
        """These experts, ascending: with the weights they have here; the others are to be put before they are called.

        Raises what torch raises when there is no memory.
        """

    @abc.abstractmethod
    def _compute(self, rows_ND: torch.Tensor, counts_E: Sequence[int]) -> torch.Tensor:
        """See `reference.expert_mlp`."""

    @torch.inference_mode()
    def forward(self, expert_ids: Sequence[int], counts: Sequence[int], rows_ND: torch.Tensor) -> torch.Tensor:
        """See Layer."""
        counts_E = [0] * len(self.expert_ids)
        for expert, count in zip(expert_ids, counts, strict=True):
            counts_E[self._index[expert]] = count
        return self._compute(rows_ND.to(self.device), counts_E).to(rows_ND.device)


class CountedLayer(LayerWeights):
    """For kernels of compiled loops alone: what they compute can be recorded (`grokmoe.recording`)."""

    @abc.abstractmethod
    def forward_counted(self, rows_ND: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """rows_ND: sorted by expert. counts_E: int64, rows of each of `expert_ids`; read when the loops run.

        Returns: out_ND, new.
        """

    def _compute(self, rows_ND: torch.Tensor, counts_E: Sequence[int]) -> torch.Tensor:
        assert sum(counts_E) == len(rows_ND), f"counts sum to {sum(counts_E)}, there are {len(rows_ND)} rows"
        return self.forward_counted(rows_ND, torch.tensor(counts_E))
