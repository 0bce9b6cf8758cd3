"""Plain-torch twin of `grouped_gemm`: one expert after the other, readable, runs wherever torch runs.

    y = ( gelu(x W^T) * (x V^T) ) W2^T

W is gate (`linear` in a checkpoint), V is up (`linear_v`), W2 is down (`linear_1`).
Shapes: N rows, E experts held, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from grokmoe.model_config import Gelu

ROW_DTYPES = (torch.float32, torch.bfloat16)


def expert_mlp(
    rows_ND: torch.Tensor,
    counts_E: Sequence[int],
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
    gelu: Gelu,
) -> torch.Tensor:
    """Passes each row through the MLP of its expert.

    rows_ND: sorted by expert: the first counts_E[0] rows belong to expert 0, and so on.
    counts_E: rows of each expert, zero allowed. Ints on the host: they arrive there, the launch grid
        depends on them, and reading them back from a device would wait for it.
    gate_EFD, up_EFD, down_EDF: weights of the rows' dtype, float32 or bfloat16.

    Returns: out_ND, new, of the rows' dtype. Rounds where the kernels round and nowhere else: products
    accumulate in float32, gelu(gate) * up is rounded once to the rows' dtype, and so is the output. With
    bfloat16 that takes float32 copies of one expert's weights at a time.
    """
    assert_consistent(rows_ND, counts_E, gate_EFD, up_EFD, down_EDF)
    out_ND = rows_ND.new_empty(rows_ND.shape)
    begin = 0
    for expert, count in enumerate(counts_E):
        if count == 0:
            continue
        end = begin + count
        x_ND = rows_ND[begin:end].float()
        gate_NF = x_ND @ gate_EFD[expert].float().T
        up_NF = x_ND @ up_EFD[expert].float().T
        approximate = "tanh" if gelu is Gelu.TANH else "none"
        h_NF = (functional.gelu(gate_NF, approximate=approximate) * up_NF).to(rows_ND.dtype)
        out_ND[begin:end] = h_NF.float() @ down_EDF[expert].float().T
        begin = end
    return out_ND


def assert_consistent(
    rows_ND: torch.Tensor,
    counts_E: Sequence[int],
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> None:
    """Asserts what both implementations rely on. On a GPU a wrong count would be a wild memory access."""
    num_rows, D = rows_ND.shape
    E, F, _ = gate_EFD.shape
    assert gate_EFD.shape == up_EFD.shape == (E, F, D), (gate_EFD.shape, up_EFD.shape, (E, F, D))
    assert down_EDF.shape == (E, D, F), (down_EDF.shape, (E, D, F))
    assert len(counts_E) == E, f"{len(counts_E)} counts for {E} experts"
    assert all(count >= 0 for count in counts_E), f"negative count in {list(counts_E)}"
    assert sum(counts_E) == num_rows, f"counts sum to {sum(counts_E)}, there are {num_rows} rows"
    assert rows_ND.dtype in ROW_DTYPES, f"rows are {rows_ND.dtype}, must be one of {ROW_DTYPES}"
    weights = (gate_EFD, up_EFD, down_EDF)
    assert all(weight.dtype == rows_ND.dtype for weight in weights), [weight.dtype for weight in weights]
    assert all(weight.device == rows_ND.device for weight in weights), [weight.device for weight in weights]
