"""The experts of one layer in the layouts of the CPU's kernels.

Shapes: N rows, E experts of the layer held here, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from expert_worker.kernels import cpu, cpu_fp8, cpu_int8, cpu_panels
from expert_worker.layer import CountedLayer, LayerWeights
from expert_worker.matrix import Matrix
from grokmoe.model_config import Gelu, ModelConfig
from grokmoe.packed_linear import PackedLinear
from grokmoe.panels import to_panels
from grokmoe.tensor_names import EXPERT_LINEARS, ExpertLinear


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


class Fp8Layer(LayerWeights):
    """For a CPU beside GPUs whose weights are in float8_e4m3fn: the same numbers (`kernels/cpu_fp8.py`)."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        rows_in_8_bits: bool,
        deterministic: bool = False,
        experts: Mapping[int, cpu_fp8.Fp8Expert] = MappingProxyType({}),
    ) -> None:
        """dtype: of rows. rows_in_8_bits: see `cpu_fp8.expert_mlp`. deterministic: see PackedLinear. experts: by
        number, ascending."""
        super().__init__(dtype, torch.device("cpu"), tuple(experts))
        self._config, self._rows_in_8_bits, self._deterministic = config, rows_in_8_bits, deterministic
        self._experts_E = list(experts.values())

    def resized(self, expert_ids: Sequence[int]) -> Fp8Layer:
        """See LayerWeights. Experts that stay are shared."""
        experts = {
            expert: self._experts_E[self._index[expert]] if self.holds(expert) else cpu_fp8.Fp8Expert()
            for expert in expert_ids
        }
        return Fp8Layer(self._config, self.dtype, self._rows_in_8_bits, self._deterministic, experts)

    def put(self, expert: int, linear: ExpertLinear, weight: torch.Tensor) -> None:
        """See Layer."""
        self.fill(expert, linear, Matrix.of(weight))

    def fill(self, expert: int, linear: ExpertLinear, matrix: Matrix) -> None:
        """See Layer."""
        part = {"linear": "gate", "linear_v": "up", "linear_1": "down"}[linear]
        dtype = cpu_fp8.product_dtype(self.dtype, self._rows_in_8_bits)
        scaled = cpu_fp8.ScaledLinear(matrix, dtype, self._deterministic)
        setattr(self._experts_E[self._index[expert]], part, scaled)

    @property
    def takes_fp8(self) -> bool:
        """See Layer."""
        return True

    def _compute(self, rows_ND: torch.Tensor, counts_E: Sequence[int]) -> torch.Tensor:
        return cpu_fp8.expert_mlp(rows_ND, counts_E, self._experts_E, self._config.gelu, self._rows_in_8_bits)
