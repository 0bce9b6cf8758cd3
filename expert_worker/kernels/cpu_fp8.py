"""Expert MLPs with weights in float8_e4m3fn on a CPU, which has no such products: the same numbers in the type of rows.

    h = gelu(s_W (x Q_W^T)) * (s_V (x Q_V^T))
    y = s_2 (h Q_2^T)

Every number of eight bits is one of bfloat16, so the weights are what a GPU multiplies with, and their scales are
factors of the finished product, as there. Where rows are quantised, too, it is float32 that is multiplied: what was
rounded before would be quantised to another number now and then. It saves no memory: this is for CPUs beside GPUs, and
for tests. int8 is the type to serve from a CPU alone.

Letters: N rows, D hidden, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from expert_worker.kernels.reference import quantise_rows
from expert_worker.matrix import Matrix
from grokmoe.linear import Linear, new_linear
from grokmoe.model_config import Gelu


def product_dtype(rows: torch.dtype, rows_in_8_bits: bool) -> torch.dtype:
    """What is multiplied for rows of a type."""
    return torch.float32 if rows_in_8_bits else rows


class ScaledLinear:
    """s (x Q^T), float32. Keeps no reference to the matrix it was made from."""

    __slots__ = ("_linear", "_scale_O")

    def __init__(self, matrix: Matrix, dtype: torch.dtype, deterministic: bool) -> None:
        """matrix: in eight bits, or to be quantised, output by output. dtype: to multiply in, see `product_dtype`.
        deterministic: see PackedLinear."""
        q_OI = torch.empty(matrix.num_outputs, matrix.num_inputs, dtype=dtype)
        self._scale_O = torch.empty(matrix.num_outputs)
        for piece in matrix.pieces():
            rows_OI, scale_O = piece.rows_OI, piece.scale_O
            if scale_O is None:
                rows_OI, scale_O = quantise_rows(rows_OI)
            q_OI[piece.rows], self._scale_O[piece.rows] = rows_OI.to(dtype), scale_O
        self._linear: Linear = new_linear(q_OI, deterministic)

    def __call__(self, x_NI: torch.Tensor, rows_in_8_bits: bool) -> torch.Tensor:
        """rows_in_8_bits: whether rows are quantised first, too."""
        if not rows_in_8_bits:
            return self._linear(x_NI).float() * self._scale_O
        q_NI, scale_N = quantise_rows(x_NI)
        return self._linear(q_NI.float()) * self._scale_O * scale_N[:, None]


class Fp8Expert:
    """The three matrices of one expert."""

    __slots__ = ("down", "gate", "up")

    gate: ScaledLinear
    up: ScaledLinear
    down: ScaledLinear

    def __call__(self, x_ND: torch.Tensor, gelu: Gelu, rows_in_8_bits: bool) -> torch.Tensor:
        """x_ND, at least one row -> y_ND, new."""
        approximate = "tanh" if gelu is Gelu.TANH else "none"
        gate_NF = functional.gelu(self.gate(x_ND, rows_in_8_bits), approximate=approximate)
        h_NF = (gate_NF * self.up(x_ND, rows_in_8_bits)).to(x_ND.dtype)
        return self.down(h_NF, rows_in_8_bits).to(x_ND.dtype)


def expert_mlp(
    rows_ND: torch.Tensor, counts_E: Sequence[int], experts_E: Sequence[Fp8Expert], gelu: Gelu, rows_in_8_bits: bool
) -> torch.Tensor:
    """Passes each row through the MLP of its expert: `reference.expert_mlp` with scales.

    rows_ND: sorted by expert. counts_E: rows of each expert, zero allowed. Returns: out_ND, new.
    """
    assert sum(counts_E) == len(rows_ND), f"counts sum to {sum(counts_E)}, there are {len(rows_ND)} rows"
    out_ND = torch.empty_like(rows_ND)
    begin = 0
    for expert, count in zip(experts_E, counts_E, strict=True):
        if count:
            out_ND[begin : begin + count] = expert(rows_ND[begin : begin + count], gelu, rows_in_8_bits)
            begin += count
    return out_ND
