"""The experts a worker holds, and the forward through them. The one place that chooses a kernel by device.

Shapes: N rows, E experts of one layer held here, D hidden, F ffn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import torch

from expert_worker.kernels import cpu, reference
from grokmoe.errors import InvalidRequest
from grokmoe.model_config import Gelu, ModelConfig
from grokmoe.packed_linear import PackedLinear
from grokmoe.tensor_names import ExpertLinear

WARM_ROWS_CPU = 32
"""oneDNN builds a kernel the first time it meets a number of rows, about a millisecond each, and keeps it. Decode steps
have few rows per expert: those kernels are built before the worker is ready."""


class LayerWeights(Protocol):
    """The experts of one layer, in the layout of their kernel."""

    def put(self, index: int, linear: ExpertLinear, weight: torch.Tensor) -> None:
        """Takes one matrix of the expert at `index`, [out, in] as in the checkpoint. Keeps no reference to it."""
        ...

    def forward(self, rows_ND: torch.Tensor, counts_E: Sequence[int]) -> torch.Tensor:
        """See `reference.expert_mlp`."""
        ...


class PackedLayer:
    """For a CPU: every matrix in oneDNN's own layout."""

    def __init__(self, config: ModelConfig, num_held: int, deterministic: bool = False) -> None:
        """deterministic: see PackedLinear."""
        self._gelu, self._deterministic = config.gelu, deterministic
        self._experts_E = [cpu.PackedExpert() for _ in range(num_held)]

    def put(self, index: int, linear: ExpertLinear, weight: torch.Tensor) -> None:
        """See LayerWeights."""
        part = {"linear": "gate", "linear_v": "up", "linear_1": "down"}[linear]
        setattr(self._experts_E[index], part, PackedLinear(weight, self._deterministic))

    def forward(self, rows_ND: torch.Tensor, counts_E: Sequence[int]) -> torch.Tensor:
        """See LayerWeights."""
        return cpu.expert_mlp(rows_ND, counts_E, self._experts_E, self._gelu)


StackedKernel = Callable[[torch.Tensor, Sequence[int], torch.Tensor, torch.Tensor, torch.Tensor, Gelu], torch.Tensor]


class StackedLayer:
    """For a kernel that takes all experts of the layer as one tensor per matrix."""

    def __init__(
        self, config: ModelConfig, num_held: int, dtype: torch.dtype, device: torch.device, kernel: StackedKernel
    ) -> None:
        D, F = config.hidden_size, config.intermediate_size
        self._gelu = config.gelu
        self._kernel = kernel
        self._gate_EFD = torch.empty(num_held, F, D, dtype=dtype, device=device)
        self._up_EFD = torch.empty_like(self._gate_EFD)
        self._down_EDF = torch.empty(num_held, D, F, dtype=dtype, device=device)

    def put(self, index: int, linear: ExpertLinear, weight: torch.Tensor) -> None:
        """See LayerWeights."""
        stacks: dict[ExpertLinear, torch.Tensor] = {
            "linear": self._gate_EFD,
            "linear_v": self._up_EFD,
            "linear_1": self._down_EDF,
        }
        stacks[linear][index].copy_(weight)

    def forward(self, rows_ND: torch.Tensor, counts_E: Sequence[int]) -> torch.Tensor:
        """See LayerWeights."""
        return self._kernel(rows_ND, counts_E, self._gate_EFD, self._up_EFD, self._down_EDF, self._gelu)


def new_layer(
    config: ModelConfig, num_held: int, dtype: torch.dtype, device: torch.device, deterministic: bool = False
) -> LayerWeights:
    """Room for the weights of one layer on its device, with the kernel that suits.

    deterministic: a row's bits must not depend on the rows beside it. The plain kernel does not promise that.
    """
    if device.type == "cpu":
        return PackedLayer(config, num_held, deterministic)
    if device.type == "cuda":
        from expert_worker.kernels import grouped_gemm  # Triton is not installed where it is not used

        kernel = grouped_gemm.expert_mlp
        if deterministic:
            kernel = functools.partial(kernel, fixed_tiles=True)
        return StackedLayer(config, num_held, dtype, device, kernel)
    return StackedLayer(config, num_held, dtype, device, reference.expert_mlp)


class ExpertSet:
    """(layer, expert) -> weights, and rows through them. Filled by `expert_worker.weights.load`.

    held: layer -> experts held there, both ascending.
    """

    def __init__(
        self,
        config: ModelConfig,
        held: Mapping[int, Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
        deterministic: bool = False,
    ) -> None:
        """deterministic: see new_layer."""
        self.config = config
        self.held = {layer: tuple(experts) for layer, experts in held.items()}
        self.dtype = dtype
        self.device = device
        self._deterministic = deterministic
        self._index = {layer: {e: i for i, e in enumerate(experts)} for layer, experts in self.held.items()}
        self._layers: dict[int, LayerWeights] = {}

    def put(self, layer: int, expert: int, linear: ExpertLinear, weight: torch.Tensor) -> None:
        """Takes one matrix, [out, in] in the set's type, into the kernel's layout."""
        if layer not in self._layers:
            self._layers[layer] = new_layer(
                self.config, len(self.held[layer]), self.dtype, self.device, self._deterministic
            )
        self._layers[layer].put(self._index[layer][expert], linear, weight)

    def ranges(self) -> list[tuple[int, int, int]]:
        """What is held as (expert, first layer, one past the last layer), ascending."""
        cells = sorted((expert, layer) for layer, experts in self.held.items() for expert in experts)
        found: list[tuple[int, int, int]] = []
        for expert, layer in cells:
            if found and found[-1][0] == expert and found[-1][2] == layer:
                found[-1] = (expert, found[-1][1], layer + 1)
            else:
                found.append((expert, layer, layer + 1))
        return found

    def check(
        self, layer: int, expert_ids: Sequence[int], counts: Sequence[int], rows_ND: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the rows of a call that `forward` may get.

        Raises InvalidRequest, naming the field of ForwardRequest, for any other.
        """
        if layer not in self.held:
            raise InvalidRequest("layer", f"is {layer}, this worker holds layers {_spans(tuple(self.held))}")
        held = self._index[layer]
        if len(expert_ids) > len(held):
            raise InvalidRequest(
                "expert_ids", f"has {len(expert_ids)} entries, this worker holds {len(held)} experts of layer {layer}"
            )
        for expert in expert_ids:
            if expert not in held:
                experts = _spans(self.held[layer])
                raise InvalidRequest(
                    "expert_ids", f"has {expert}, this worker holds experts {experts} of layer {layer}"
                )
        if any(left >= right for left, right in pairwise(expert_ids)):
            raise InvalidRequest("expert_ids", f"is {list(expert_ids)}, must be strictly ascending")
        if len(counts) != len(expert_ids):
            raise InvalidRequest("counts", f"has {len(counts)} entries for {len(expert_ids)} expert_ids")
        if rows_ND is None:
            raise InvalidRequest("payload", "is missing")
        if rows_ND.dtype is not self.dtype:
            raise InvalidRequest("payload.dtype", f"is {rows_ND.dtype}, this worker computes in {self.dtype}")
        if rows_ND.dim() != 2 or rows_ND.shape[1] != self.config.hidden_size:
            raise InvalidRequest(
                "payload.shape", f"is {list(rows_ND.shape)}, must be [rows, {self.config.hidden_size}]"
            )
        if sum(counts) != len(rows_ND):
            raise InvalidRequest("counts", f"sum to {sum(counts)}, payload has {len(rows_ND)} rows")
        return rows_ND

    @torch.inference_mode()
    def forward(
        self, layer: int, expert_ids: Sequence[int], counts: Sequence[int], rows_ND: torch.Tensor
    ) -> torch.Tensor:
        """Rows through their experts' MLPs.

        expert_ids: strictly ascending. counts: rows of each; rows_ND is sorted in that order.
        Returns: out_ND, new, on the rows' device.
        """
        index = self._index[layer]
        counts_E = [0] * len(index)
        for expert, count in zip(expert_ids, counts, strict=True):
            counts_E[index[expert]] = count
        out_ND = self._layers[layer].forward(rows_ND.to(self.device), counts_E)
        return out_ND.to(rows_ND.device)

    def warm_up(self) -> None:
        """Computes rows that nobody asked for, so that the first caller does not pay for what happens only once."""
        layer, experts = next(iter(self.held.items()))
        for num_rows in range(1, WARM_ROWS_CPU + 1) if self.device.type == "cpu" else (1, len(experts)):
            rows_ND = torch.zeros(num_rows, self.config.hidden_size, dtype=self.dtype)
            self.forward(layer, experts[:1], [num_rows], rows_ND)


def _spans(numbers: Sequence[int]) -> str:
    """Ascending numbers for a reader: 0-3, 7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in spans)
