"""Plain-torch twin of `cpu_int8`: the same quantised numbers, multiplied as float64, which is exact for their sums.

    q, s = quantise_rows(x)
    h = gelu(s s_W (q Q_W^T)) * (s s_V (q Q_V^T))
    y = s' s_2 (q' Q_2^T)                            with q', s' = quantise_rows(h)

Shapes: N rows, E experts held, D hidden, F ffn, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from expert_worker.kernels.int8_weights import quantise_rows
from grokmoe.model_config import Gelu


def expert_mlp(
    rows_ND: torch.Tensor,
    counts_E: Sequence[int],
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
    gelu: Gelu,
) -> torch.Tensor:
    """`reference.expert_mlp` with weights and rows as int8. The weights are those of the checkpoint, in any type."""
    out_ND = rows_ND.new_empty(rows_ND.shape)
    approximate = "tanh" if gelu is Gelu.TANH else "none"
    begin = 0
    for expert, count in enumerate(counts_E):
        x_ND = rows_ND[begin : begin + count]
        if count:
            gate_NF, up_NF = product(x_ND, gate_EFD[expert]), product(x_ND, up_EFD[expert])
            h_NF = functional.gelu(gate_NF, approximate=approximate) * up_NF
            out_ND[begin : begin + count] = product(h_NF, down_EDF[expert])
        begin += count
    return out_ND


def product(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x W^T of quantised rows and a quantised weight, float32."""
    x, weight = quantise_rows(x_NI), quantise_rows(weight_OI)
    sums_NO = x.q.double() @ weight.q.double().T
    return sums_NO.float() * (x.scale[:, None] * weight.scale[None])
