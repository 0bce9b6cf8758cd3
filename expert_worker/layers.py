"""The experts of one layer in the layout of their kernel. The one place that chooses a kernel by device.

Shapes: N rows, E experts of the layer held here, D hidden, F ffn.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Self

import torch

from expert_worker.expert_dtype import INT8, SAME, check_expert_dtype
from expert_worker.kernels import cpu, cpu_int8, cpu_panels, reference
from grokmoe.model_config import Gelu, ModelConfig
from grokmoe.packed_linear import PackedLinear
from grokmoe.panels import to_panels
from grokmoe.tensor_names import EXPERT_LINEARS, ExpertLinear


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


class PackedLayer(LayerWeights):
    """For a CPU: every matrix in oneDNN's own layout."""

    def __init__(
        self,
        dtype: torch.dtype,
        gelu: Gelu,
        deterministic: bool = False,
        experts: Mapping[int, cpu.PackedExpert] = MappingProxyType({}),
    ) -> None:
        """deterministic: see PackedLinear. experts: by number, ascending."""
        super().__init__(dtype, torch.device("cpu"), tuple(experts))
        self._gelu, self._deterministic = gelu, deterministic
        self._experts_E = list(experts.values())

    def resized(self, expert_ids: Sequence[int]) -> PackedLayer:
        """See LayerWeights. Experts that stay are shared."""
        experts = {
            expert: self._experts_E[self._index[expert]] if self.holds(expert) else cpu.PackedExpert()
            for expert in expert_ids
        }
        return PackedLayer(self.dtype, self._gelu, self._deterministic, experts)

    def put(self, expert: int, linear: ExpertLinear, weight: torch.Tensor) -> None:
        """See Layer."""
        part = {"linear": "gate", "linear_v": "up", "linear_1": "down"}[linear]
        setattr(self._experts_E[self._index[expert]], part, PackedLinear(weight, self._deterministic))

    def _compute(self, rows_ND: torch.Tensor, counts_E: Sequence[int]) -> torch.Tensor:
        return cpu.expert_mlp(rows_ND, counts_E, self._experts_E, self._gelu)


class PanelLayer(CountedLayer):
    """For a CPU that multiplies bfloat16 by panels (`grokmoe.panels`): always deterministic."""

    def __init__(
        self,
        config: ModelConfig,
        panels: Mapping[int, dict[ExpertLinear, torch.Tensor]] = MappingProxyType({}),
    ) -> None:
        """panels: of each expert by its number, ascending."""
        super().__init__(torch.bfloat16, torch.device("cpu"), tuple(panels))
        self._config = config
        self._panels_E = list(panels.values())
        self._addresses_E3 = torch.zeros(len(panels), len(EXPERT_LINEARS), dtype=torch.int64)
        for index in range(len(panels)):
            self._note_addresses(index)

    def _note_addresses(self, index: int) -> None:
        for place, linear in enumerate(("linear", "linear_v", "linear_1")):  # gate, up, down
            if (panels := self._panels_E[index].get(linear)) is not None:
                self._addresses_E3[index, place] = panels.data_ptr()

    def resized(self, expert_ids: Sequence[int]) -> PanelLayer:
        """See LayerWeights. Experts that stay are shared."""
        panels = {expert: self._panels_E[self._index[expert]] if self.holds(expert) else {} for expert in expert_ids}
        return PanelLayer(self._config, panels)

    def put(self, expert: int, linear: ExpertLinear, weight: torch.Tensor) -> None:
        """See Layer."""
        index = self._index[expert]
        self._panels_E[index][linear] = to_panels(weight)
        self._note_addresses(index)

    def forward_counted(self, rows_ND: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """See CountedLayer."""
        config = self._config
        return cpu_panels.expert_mlp(rows_ND, counts_E, self._addresses_E3, config.intermediate_size, config.gelu)


class QuantisedLayer(CountedLayer):
    """For a CPU, with weights in int8 (`kernels/cpu_int8.py`): always deterministic."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        experts: Mapping[int, cpu_int8.QuantisedExpert] = MappingProxyType({}),
    ) -> None:
        """dtype: of rows, and of the weights that are put. experts: by number, ascending."""
        super().__init__(dtype, torch.device("cpu"), tuple(experts))
        self._config = config
        self._experts_E = list(experts.values())
        self._tables = cpu_int8.tables_of(self._experts_E)

    def resized(self, expert_ids: Sequence[int]) -> QuantisedLayer:
        """See LayerWeights. Experts that stay are shared."""
        D, F = self._config.hidden_size, self._config.intermediate_size
        experts = {
            expert: self._experts_E[self._index[expert]] if self.holds(expert) else cpu_int8.QuantisedExpert(D, F)
            for expert in expert_ids
        }
        return QuantisedLayer(self._config, self.dtype, experts)

    def put(self, expert: int, linear: ExpertLinear, weight: torch.Tensor) -> None:
        """See Layer."""
        quantised = self._experts_E[self._index[expert]]
        if linear == "linear_1":
            quantised.down.put(weight)
        else:
            quantised.gate_up.put(weight, cpu_int8.GATE if linear == "linear" else cpu_int8.UP)

    def forward_counted(self, rows_ND: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """See CountedLayer."""
        config = self._config
        return cpu_int8.expert_mlp(rows_ND, counts_E, self._tables, config.intermediate_size, config.gelu)


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
        self._stacks[linear][self._index[expert]].copy_(weight)

    def _compute(self, rows_ND: torch.Tensor, counts_E: Sequence[int]) -> torch.Tensor:
        gate_EFD, up_EFD, down_EDF = self._stacks.values()
        return self._kernel(rows_ND, counts_E, gate_EFD, up_EFD, down_EDF, self._config.gelu)


def new_layer(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    deterministic: bool = False,
    expert_dtype: str = SAME,
) -> LayerWeights:
    """A layer without experts on its device, with the kernel that suits.

    deterministic: a row's bits must not depend on the rows beside it. The plain kernel does not promise that.
    expert_dtype: what the weights are stored in, of EXPERT_DTYPES. Raises ConfigError where that cannot be.
    """
    check_expert_dtype(expert_dtype, config, device.type)
    if expert_dtype == INT8:
        return QuantisedLayer(config, dtype)
    if device.type == "cpu":
        if cpu_panels.can_compute(config, dtype):
            return PanelLayer(config)
        return PackedLayer(dtype, config.gelu, deterministic)
    if device.type == "cuda":
        from expert_worker.kernels import grouped_gemm  # Triton is not installed where it is not used

        kernel = grouped_gemm.expert_mlp
        if deterministic:
            kernel = functools.partial(kernel, fixed_tiles=True)
        return StackedLayer(config, dtype, device, kernel)
    return StackedLayer(config, dtype, device, reference.expert_mlp)
