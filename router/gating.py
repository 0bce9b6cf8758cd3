"""Which experts a token goes to, and with what weight. Pure tensor arithmetic, float32.

Letters: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

import torch

from grokmoe.model_config import ModelConfig


def gate(x_TD: torch.Tensor, gate_DE: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the experts of every token.

    z = x W; optionally capped to 30 tanh(z / 30); p = softmax(z) over all experts; the K largest, optionally
    renormalised to sum to one (docs/numerics.md, "MoE").

    x_TD: MoE input, any float type. gate_DE: float32, transposed from the checkpoint's [E, D].
    Returns: weights_TK float32 in descending order, expert_ids_TK int64. Of equal probabilities either may be first.
    """
    logits_TE = x_TD.float() @ gate_DE
    if config.router_cap is not None:
        logits_TE = config.router_cap * torch.tanh(logits_TE / config.router_cap)
    weights_TK, expert_ids_TK = logits_TE.softmax(-1).topk(config.experts_per_token, dim=-1)
    if config.renormalize_gates:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK, expert_ids_TK
