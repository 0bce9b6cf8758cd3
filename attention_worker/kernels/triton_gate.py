"""Which experts a token goes to and with what weight, in one Triton kernel: logits, cap, softmax, the K largest.

For a device that has the MoE input and not yet sent it anywhere. What it computes is `reference.gate`; the router's own
loops compute the same from the rows that it is sent.

A token's bits depend on the token alone.
Shapes: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_D = 512
"""Of the hidden size, in one step. Eight experts' weights then fit into the registers beside the tokens."""


def gate(
    x_TD: torch.Tensor, gate_ED: torch.Tensor, num_ranks: int, cap: float | None, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.gate`."""
    num_tokens, width = x_TD.shape
    num_experts = len(gate_ED)
    assert x_TD.stride(1) == 1, "a token's values are not next to each other"
    assert gate_ED.is_contiguous(), "gate weights are not contiguous"
    weights_TK = x_TD.new_empty(num_tokens, num_ranks, dtype=torch.float32)
    expert_ids_TK = x_TD.new_empty(num_tokens, num_ranks, dtype=torch.int64)
    if num_tokens:
        with torch.cuda.device_of(x_TD):
            gate_kernel[(num_tokens,)](
                x_TD, gate_ED, weights_TK, expert_ids_TK, width, x_TD.stride(0), 0.0 if cap is None else cap,
                EXPERTS=num_experts, RANKS=num_ranks, CAPS=cap is not None, RENORMALIZES=renormalize,
                BLOCK_E=triton.next_power_of_2(num_experts), BLOCK_R=triton.next_power_of_2(num_ranks), BLOCK_D=BLOCK_D,
                num_warps=4,
            )  # fmt: skip
    return weights_TK, expert_ids_TK


@triton.jit
def gate_kernel(
    x_ptr, gate_ptr, weights_ptr, ids_ptr, D, x_stride_t, cap,
    EXPERTS: tl.constexpr, RANKS: tl.constexpr, CAPS: tl.constexpr, RENORMALIZES: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token. Grid: (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for first in range(0, D, BLOCK_D):
        d_ok = d < D - first
        x = tl.load(x_ptr + token * x_stride_t + first + d, mask=d_ok, other=0.0).to(tl.float32)
        w_ok = (e < EXPERTS)[:, None] & d_ok[None, :]
        w = tl.load(gate_ptr + e[:, None] * D + first + d[None, :], mask=w_ok, other=0.0)
        acc += x[None, :] * w
    logit = tl.sum(acc, 1)
    if CAPS:
        # tanh from exp of the magnitude's negative: no difference of two large numbers, nothing overflows.
        fall = tl.exp(-2 * tl.abs(logit) / cap)
        logit = tl.where(logit < 0, -cap, cap) * ((1 - fall) / (1 + fall))
    is_expert = e < EXPERTS
    chance = tl.exp(logit - tl.max(tl.where(is_expert, logit, float("-inf")), 0))
    chance = tl.where(is_expert, chance, 0.0)
    # What is no number has no order, and comes back as weights that are none either: of the first experts.
    is_faulty = tl.sum(tl.where(chance != chance, 1, 0), 0) > 0
    left = tl.where(is_expert, tl.where(is_faulty, 0.0, chance), -1.0)
    r = tl.arange(0, BLOCK_R)
    ids = tl.zeros((BLOCK_R,), tl.int64)
    chosen = tl.zeros((BLOCK_R,), tl.float32)
    for rank in tl.static_range(RANKS):
        best = tl.argmax(left, 0)  # of equal ones the first
        ids = tl.where(r == rank, best.to(tl.int64), ids)
        chosen = tl.where(r == rank, tl.sum(tl.where(e == best, chance, 0.0), 0), chosen)
        left = tl.where(e == best, -1.0, left)
    total = tl.sum(chosen if RENORMALIZES else chance, 0)
    weights = tl.where(is_faulty, float("nan"), chosen / total)
    tl.store(ids_ptr + token * RANKS + r, ids, mask=r < RANKS)
    tl.store(weights_ptr + token * RANKS + r, weights, mask=r < RANKS)
