"""The experts a worker holds, or slices of them: which they are, whether a call may use them, and rows through them.

Shapes: N rows, D hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from expert_worker.cells import Cell, cells_of
from expert_worker.expert_dtype import FP8_DTYPES, FP8_ROWS, INT8, SAME
from expert_worker.holdings import Holdings
from expert_worker.joining import RowsByExpert
from expert_worker.kernels import cpu_fp8, cpu_int8
from expert_worker.layer import Layer, LayerWeights
from expert_worker.layers import new_layer
from expert_worker.mixed_layer import narrowed, resized
from grokmoe.errors import FailedPrecondition, InvalidRequest, Reason
from grokmoe.expert_spec import describe_units
from grokmoe.expert_units import FIRST_SLICE, check_slicing, describe_unit, expert_of, num_slices_of
from grokmoe.model_config import ModelConfig
from grokmoe.tensor_names import EXPERT_LINEARS

WARM_ROWS_CPU = 32
"""oneDNN builds a kernel the first time it meets a number of rows, about a millisecond each, and keeps it. Decode steps
have few rows per expert: those kernels are built before the worker is ready."""


class ExpertCall(NamedTuple):
    """A call that can be computed, and the weights that it was checked against and is computed with."""

    weights: Layer
    rows: RowsByExpert


class ExpertSet:
    """(layer, unit) -> weights, and rows through them. Filled by `expert_worker.weights.load`.

    holdings: which experts these are. layers: the weights of each layer, a tuple that is replaced as a whole
    (`replace`): by one thread at a time, and read by any.
    """

    def __init__(
        self,
        config: ModelConfig,
        held: Mapping[int, Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
        deterministic: bool = False,
        capacity: int = 0,
        expert_dtype: str = SAME,
    ) -> None:
        """held: layer -> units to hold there, both ascending. deterministic, expert_dtype: see new_layer. capacity:
        see Holdings.

        Raises ConfigError when they are more than the capacity, or slices that do not divide, and as new_layer does.
        """
        for num_slices in {num_slices_of(unit) for units in held.values() for unit in units}:
            check_slicing("experts: the number of slices", num_slices, config.intermediate_size)
        self.config = config
        self.dtype = dtype
        self.device = device
        self.deterministic = deterministic
        self.expert_dtype = expert_dtype
        self.holdings = Holdings(cells_of(held), capacity)
        self.layers: tuple[Layer, ...] = (self._new_layer(),) * config.num_layers

    @property
    def expert_bytes(self) -> int:
        """What one expert of one layer takes, all of it."""
        return self._unit_bytes(1)

    def _unit_bytes(self, num_slices: int) -> int:
        ffn_size = self.config.intermediate_size // num_slices
        if self.expert_dtype == INT8:
            return cpu_int8.expert_bytes(self.config.hidden_size, ffn_size)
        if self.expert_dtype in FP8_DTYPES:
            each = 1
            if self.device.type == "cpu":
                each = cpu_fp8.product_dtype(self.dtype, self.expert_dtype == FP8_ROWS).itemsize
            num_outputs = 2 * ffn_size + self.config.hidden_size
            return len(EXPERT_LINEARS) * self.config.hidden_size * ffn_size * each + num_outputs * 4
        return len(EXPERT_LINEARS) * self.config.hidden_size * ffn_size * self.dtype.itemsize

    def bytes_of(self, cells: Iterable[Cell]) -> int:
        """What these take."""
        numbers = Counter(num_slices_of(unit) for _, unit in cells)
        return sum(number * self._unit_bytes(num_slices) for num_slices, number in numbers.items())

    def most_at_once(self, cells: Iterable[Cell]) -> int:
        """What loading these takes for a moment beside what they take: one of them, or a matrix as it was read."""
        num_slices = min(num_slices_of(unit) for _, unit in cells)
        matrix = self.config.hidden_size * self.config.intermediate_size // num_slices * self.dtype.itemsize
        return max(self._unit_bytes(num_slices), matrix)

    def _new_layer(self, num_slices: int = 1) -> LayerWeights:
        """One without experts, for experts that are cut into so many slices."""
        config = narrowed(self.config, num_slices)
        return new_layer(config, self.dtype, self.device, self.deterministic, self.expert_dtype)

    def resized(self, layer: int, units: Sequence[int]) -> Layer:
        """See `mixed_layer.resized`."""
        return resized(self.layers[layer], units, self._new_layer)

    def replace(self, layer: int, weights: Layer) -> None:
        """Lets calls that are checked from now on find these experts in the layer."""
        self.layers = (*self.layers[:layer], weights, *self.layers[layer + 1 :])

    def remove(self, layer: int, expert_ids: Sequence[int]) -> None:
        """Takes experts out of a layer. Their memory is free when the last call that uses them has ended."""
        left = [expert for expert in self.layers[layer].expert_ids if expert not in expert_ids]
        self.replace(layer, self.resized(layer, left))

    def check(
        self, layer: int, expert_ids: Sequence[int], counts: Sequence[int], rows_ND: torch.Tensor | None
    ) -> ExpertCall:
        """Returns the call, which can be computed whatever is given up later. expert_ids: units.

        Raises InvalidRequest, naming the field of ForwardRequest, for what no worker computes, and FailedPrecondition
        for experts that are not here.
        """
        if not 0 <= layer < self.config.num_layers:
            raise InvalidRequest("layer", f"is {layer}, the model has layers 0 to {self.config.num_layers - 1}")
        weights = self.layers[layer]
        if len(expert_ids) > max(self.config.num_experts, len(weights.expert_ids)):
            raise InvalidRequest(
                "expert_ids", f"has {len(expert_ids)} entries, the model has {self.config.num_experts} experts"
            )
        for unit in expert_ids:
            expert = unit if unit < FIRST_SLICE else expert_of(unit)
            if not 0 <= expert < self.config.num_experts:
                raise InvalidRequest(
                    "expert_ids", f"has {expert}, the model has experts 0 to {self.config.num_experts - 1}"
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
        for unit in expert_ids:
            if not weights.holds(unit):
                held = describe_units(weights.expert_ids)
                raise FailedPrecondition(
                    f"expert {describe_unit(unit)} of layer {layer} is not held here; of this layer it holds {held}",
                    reason=Reason.EXPERT_NOT_HELD,
                )
        return ExpertCall(weights, RowsByExpert(expert_ids, counts, rows_ND))

    def forward(
        self, layer: int, expert_ids: Sequence[int], counts: Sequence[int], rows_ND: torch.Tensor
    ) -> torch.Tensor:
        """See Layer.forward."""
        return self.layers[layer].forward(expert_ids, counts, rows_ND)

    def warm_up(self) -> None:
        """Computes rows that nobody asked for, so that the first caller does not pay for what happens only once.

        On the thread that will compute, before anything is loaded beside it. What happens only once depends on sizes,
        not on weights, so a worker that holds nothing computes with an expert of random numbers.
        """
        of_width = {num_slices_of(unit): (self.layers[layer], unit) for layer, unit in sorted(self.holdings.held)}
        for weights, unit in of_width.values() or [(self._random_layer(), 0)]:
            for num_rows in range(1, WARM_ROWS_CPU + 1) if self.device.type == "cpu" else (1, len(weights.expert_ids)):
                rows_ND = torch.zeros(num_rows, self.config.hidden_size, dtype=self.dtype)
                weights.forward((unit,), [num_rows], rows_ND)

    def _random_layer(self) -> LayerWeights:
        """One expert. Random, because a deterministic layer compares results, and those of zeros are all alike."""
        weights = self._new_layer().resized((0,))
        random = torch.Generator().manual_seed(0)
        D, F = self.config.hidden_size, self.config.intermediate_size
        for linear in EXPERT_LINEARS:
            shape = (D, F) if linear == "linear_1" else (F, D)
            weights.put(0, linear, torch.rand(shape, dtype=self.dtype, generator=random).sub_(0.5))
        return weights
