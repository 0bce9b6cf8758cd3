"""Expert MLPs on a CPU: a loop over experts, each three GEMMs on weights that oneDNN laid out when they were loaded.

    h = gelu(x W^T) * (x V^T)    the GELU rides on the first product, the multiplication on the second
    y = h W2^T

Both ride in float32 before the product is rounded, so in bfloat16 `h` is rounded twice, not three times as with
separate operations. A loop is as good as it gets: torch's grouped GEMM on a CPU is one, over weights not laid out.

A row's result does not depend on the rows beside it, see `grokmoe.packed_linear`.
Shapes: N rows, E experts, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grokmoe.model_config import Gelu
from grokmoe.packed_linear import PackedLinear


class PackedExpert:
    """The three matrices of one expert, in the kernel's layout."""

    __slots__ = ("down", "gate", "up")

    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear

    def __call__(self, x_ND: torch.Tensor, gelu: Gelu) -> torch.Tensor:
        """x_ND, at least one row -> y_ND, new."""
        h_NF = self.up(x_ND, times_NO=self.gate(x_ND, gelu))
        return self.down(h_NF)


def expert_mlp(
    rows_ND: torch.Tensor, counts_E: Sequence[int], experts_E: Sequence[PackedExpert], gelu: Gelu
) -> torch.Tensor:
    """Passes each row through the MLP of its expert: `reference.expert_mlp` on packed weights.

    rows_ND: sorted by expert, contiguous. counts_E: rows of each expert, zero allowed.
    Returns: out_ND, new. The one copy, into out_ND, is left out when all rows belong to one expert.
    """
    assert len(counts_E) == len(experts_E), f"{len(counts_E)} counts for {len(experts_E)} experts"
    assert sum(counts_E) == len(rows_ND), f"counts sum to {sum(counts_E)}, there are {len(rows_ND)} rows"
    if max(counts_E, default=0) == len(rows_ND):
        busy = next((expert for expert, count in zip(experts_E, counts_E, strict=True) if count), None)
        return rows_ND.clone() if busy is None else busy(rows_ND, gelu)
    out_ND = torch.empty_like(rows_ND)
    begin = 0
    for expert, count in zip(experts_E, counts_E, strict=True):
        if count:
            out_ND[begin : begin + count] = expert(rows_ND[begin : begin + count], gelu)
            begin += count
    return out_ND
