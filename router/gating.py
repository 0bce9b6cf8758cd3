"""Which experts a token goes to, and with what weight. Pure arithmetic; a token's does not depend on the others.

Letters: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

import torch

from grokmoe.model_config import ModelConfig
from router import row_loops


def gate(x_TD: torch.Tensor, gate_ED: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the experts of every token.

    z = W x in float32; optionally capped to 30 tanh(z / 30); p = softmax(z) over all experts; the K largest, optionally
    renormalised to sum to one (docs/numerics.md, "MoE").

    x_TD: MoE input, float32 or bfloat16. gate_ED: float32, as in the checkpoint.
    Returns: weights_TK float32 in descending order, expert_ids_TK int64. Of equal probabilities the lower expert is
    first. A token that is no number gets K experts all the same, with weights that are none.
    """
    num_tokens, num_ranks = len(x_TD), config.experts_per_token
    weights_TK = torch.empty(num_tokens, num_ranks, dtype=torch.float32)
    expert_ids_TK = torch.empty(num_tokens, num_ranks, dtype=torch.int64)
    row_loops.gate(
        x_TD.dtype, num_tokens, x_TD.shape[1], config.num_experts, num_ranks,
        config.router_cap or 0.0, int(config.renormalize_gates), x_TD.contiguous(), gate_ED, weights_TK, expert_ids_TK,
    )  # fmt: skip
    return weights_TK, expert_ids_TK
