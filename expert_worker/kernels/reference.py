"""Plain-torch twin of `grouped_gemm`: one expert after the other, readable, runs wherever torch runs.

    y = ( gelu(x W^T) * (x V^T) ) W2^T

W is gate (`linear` in a checkpoint), V is up (`linear_v`), W2 is down (`linear_1`).
Shapes: N rows, E experts held, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from grokmoe.model_config import Gelu

ROW_DTYPES = (torch.float32, torch.bfloat16)

LARGEST_E4M3 = 448.0
"""The largest number of float8_e4m3fn."""


class ChannelScales(NamedTuple):
    """What weights in eight bits are multiplied with, float32, one per output channel."""

    gate_EF: torch.Tensor
    up_EF: torch.Tensor
    down_ED: torch.Tensor


def quantise_rows(x_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(q_NK float8_e4m3fn, scale_N float32) such that q * scale is x up to rounding, and each row's largest value the
    largest of the format. The scale of a row of zeros is 1. Weights [E * C, K] are quantised the same way: a row of
    them is an output channel."""
    largest_N = x_NK.float().abs().amax(-1)
    scale_N = torch.where(largest_N > 0, largest_N / LARGEST_E4M3, 1.0)
    return (x_NK.float() / scale_N[:, None]).to(torch.float8_e4m3fn), scale_N


def expert_mlp(
    rows_ND: torch.Tensor,
    counts_E: Sequence[int],
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
    gelu: Gelu,
    scales: ChannelScales | None = None,
    rows_in_8_bits: bool = False,
) -> torch.Tensor:
    """Passes each row through the MLP of its expert.

    rows_ND: sorted by expert: the first counts_E[0] rows belong to expert 0, and so on.
    counts_E: rows of each expert, zero allowed. Ints on the host: they arrive there, the launch grid
        depends on them, and reading them back from a device would wait for it.
    gate_EFD, up_EFD, down_EDF: weights of the rows' dtype, float32 or bfloat16; float8_e4m3fn with scales.
    scales: for weights in eight bits. rows_in_8_bits: whether what goes into a product is quantised row by row first.

    Returns: out_ND, new, of the rows' dtype. Rounds where the kernels round and nowhere else: products
    accumulate in float32, gelu(gate) * up is rounded once to the rows' dtype, and so is the output. With
    bfloat16 that takes float32 copies of one expert's weights at a time.
    """
    assert_consistent(rows_ND, counts_E, gate_EFD, up_EFD, down_EDF, scales)
    out_ND = rows_ND.new_empty(rows_ND.shape)

    def product(x_NK: torch.Tensor, expert: int, part: int) -> torch.Tensor:
        if rows_in_8_bits:
            x_NK, x_scale_N = quantise_rows(x_NK)
            x_NK = x_NK.float() * x_scale_N[:, None]
        y_NC = x_NK.float() @ (gate_EFD, up_EFD, down_EDF)[part][expert].float().T
        return y_NC if scales is None else y_NC * scales[part][expert]

    begin = 0
    for expert, count in enumerate(counts_E):
        if count == 0:
            continue
        end = begin + count
        gate_NF = product(rows_ND[begin:end], expert, 0)
        up_NF = product(rows_ND[begin:end], expert, 1)
        approximate = "tanh" if gelu is Gelu.TANH else "none"
        h_NF = (functional.gelu(gate_NF, approximate=approximate) * up_NF).to(rows_ND.dtype)
        out_ND[begin:end] = product(h_NF, expert, 2)
        begin = end
    return out_ND


def assert_consistent(
    rows_ND: torch.Tensor,
    counts_E: Sequence[int],
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
    scales: ChannelScales | None = None,
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
    expected = rows_ND.dtype if scales is None else torch.float8_e4m3fn
    assert all(weight.dtype == expected for weight in weights), [weight.dtype for weight in weights]
    assert all(weight.device == rows_ND.device for weight in weights), [weight.device for weight in weights]
    if scales is not None:
        assert scales.gate_EF.shape == scales.up_EF.shape == (E, F), [scale.shape for scale in scales]
        assert scales.down_ED.shape == (E, D), (scales.down_ED.shape, (E, D))
        assert all(scale.dtype == torch.float32 and scale.is_contiguous() for scale in scales), scales
