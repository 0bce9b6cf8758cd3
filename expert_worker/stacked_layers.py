"""The experts of one layer for kernels that take all of them as one tensor per matrix: those of GPUs, and plain ones.

Shapes: N rows, E experts of the layer held here, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from expert_worker.kernels.reference import ChannelScales
from expert_worker.layer import LayerWeights
from expert_worker.matrix import Matrix
from grokmoe.model_config import Gelu, ModelConfig
from grokmoe.tensor_names import ExpertLinear

StackedKernel = Callable[[torch.Tensor, Sequence[int], torch.Tensor, torch.Tensor, torch.Tensor, Gelu], torch.Tensor]


class StackedLayer(LayerWeights):
    """For a kernel that takes all experts of the layer as one tensor per matrix."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, kernel: StackedKernel,
        expert_ids: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__(dtype, device, expert_ids)
        self._config, self._kernel = config, kernel
        E, D, F = len(self.expert_ids), config.hidden_size, config.intermediate_size
        self._stacks: dict[ExpertLinear, torch.Tensor] = {
            "linear": torch.empty(E, F, D, dtype=dtype, device=device),
            "linear_v": torch.empty(E, F, D, dtype=dtype, device=device),
            "linear_1": torch.empty(E, D, F, dtype=dtype, device=device),
        }

    def resized(self, expert_ids: Sequence[int]) -> StackedLayer:
        """See LayerWeights. Experts that stay are copied, so for a moment both stacks are there."""
        other = StackedLayer(self._config, self.dtype, self.device, self._kernel, expert_ids)
        for expert in filter(self.holds, expert_ids):
            for linear, stack in self._stacks.items():
                other.put(expert, linear, stack[self._index[expert]])
        return other

    def put(self, expert: int, linear: ExpertLinear, weight: torch.Tensor) -> None:
        """See Layer."""
        self.fill(expert, linear, Matrix.of(weight))

    def fill(self, expert: int, linear: ExpertLinear, matrix: Matrix) -> None:
        """See Layer. Straight into its place: the host never has more of it than a piece."""
        place_OI = self._stacks[linear][self._index[expert]]
        for piece in matrix.pieces():
            place_OI[piece.rows].copy_(piece.rows_OI)

    def _compute(self, rows_ND: torch.Tensor, counts_E: Sequence[int]) -> torch.Tensor:
        gate_EFD, up_EFD, down_EDF = self._stacks.values()
        return self._kernel(rows_ND, counts_E, gate_EFD, up_EFD, down_EDF, self._config.gelu)


class Fp8Kernel(Protocol):
    """See `reference.expert_mlp`, with scales."""

    def __call__(
        self,
        rows_ND: torch.Tensor,
        counts_E: Sequence[int],
        gate_EFD: torch.Tensor,
        up_EFD: torch.Tensor,
        down_EDF: torch.Tensor,
        gelu: Gelu,
        *,
        scales: ChannelScales | None,
        rows_in_8_bits: bool,
    ) -> torch.Tensor: ...


QuantiseRows = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""See `reference.quantise_rows`."""


class StackedFp8Layer(LayerWeights):
    """The same with weights in float8_e4m3fn and a scale for each output. What is not in it yet is quantised as it
    comes, on the device."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, kernel: Fp8Kernel,
        quantise_rows: QuantiseRows, rows_in_8_bits: bool, expert_ids: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """dtype: of rows. rows_in_8_bits: whether they are quantised before each product, too."""
        super().__init__(dtype, device, expert_ids)
        self._config, self._kernel, self._quantise_rows = config, kernel, quantise_rows
        self._rows_in_8_bits = rows_in_8_bits
        E, D, F = len(self.expert_ids), config.hidden_size, config.intermediate_size
        shapes: dict[ExpertLinear, tuple[int, int, int]] = {
            "linear": (E, F, D), "linear_v": (E, F, D), "linear_1": (E, D, F)
        }  # fmt: skip
        self._stacks = {
            linear: torch.empty(shape, dtype=torch.float8_e4m3fn, device=device) for linear, shape in shapes.items()
        }
        self._scales = {linear: torch.empty(shape[:2], device=device) for linear, shape in shapes.items()}

    def resized(self, expert_ids: Sequence[int]) -> StackedFp8Layer:
        """See LayerWeights. Experts that stay are copied, so for a moment both stacks are there."""
        other = StackedFp8Layer(
            self._config, self.dtype, self.device, self._kernel, self._quantise_rows, self._rows_in_8_bits, expert_ids
        )
        for expert in filter(self.holds, expert_ids):
            for linear, stack in self._stacks.items():
                here, there = self._index[expert], other._index[expert]
                other._stacks[linear][there].copy_(stack[here])
                other._scales[linear][there].copy_(self._scales[linear][here])
        return other

    def put(self, expert: int, linear: ExpertLinear, weight: torch.Tensor) -> None:
        """See Layer."""
        self.fill(expert, linear, Matrix.of(weight))

    def fill(self, expert: int, linear: ExpertLinear, matrix: Matrix) -> None:
        """See Layer. Straight into its place: neither host nor device has more of it in more bits than a piece."""
        index = self._index[expert]
        place_OI, scales_O = self._stacks[linear][index], self._scales[linear][index]
        for piece in matrix.pieces():
            rows_OI, scale_O = piece.rows_OI.to(self.device), piece.scale_O
            if scale_O is None:
                rows_OI, scale_O = self._quantise_rows(rows_OI)
            place_OI[piece.rows].copy_(rows_OI)
            scales_O[piece.rows].copy_(scale_O)

    @property
    def takes_fp8(self) -> bool:
        """See Layer."""
        return True

    def _compute(self, rows_ND: torch.Tensor, counts_E: Sequence[int]) -> torch.Tensor:
        gate_EFD, up_EFD, down_EDF = self._stacks.values()
        scales = ChannelScales(*self._scales.values())
        return self._kernel(
            rows_ND, counts_E, gate_EFD, up_EFD, down_EDF, self._config.gelu,
            scales=scales, rows_in_8_bits=self._rows_in_8_bits,
        )  # fmt: skip
