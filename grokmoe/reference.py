"""The whole model in plain float32 torch, without cache or batch: an oracle to hold against docs/numerics.md.

Slow on purpose: every step is the equation, and every call computes all positions anew.

Shapes: T tokens, V vocabulary, H hidden, Q query heads, J KV heads, D head size, E experts, K experts per token,
F expert width, L layers, N the tokens that chose one expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.model_config import Gelu, ModelConfig


@dataclasses.dataclass
class Trace:
    """What happened inside a forward pass; each list has one entry per layer, `hidden` one more at the front.

    hidden: the residual [T, H] before layer 0 and after each layer.
    router_logits: [T, E], after the cap. experts: the chosen [T, K], best first.
    """

    hidden: list[torch.Tensor] = dataclasses.field(default_factory=list)
    router_logits: list[torch.Tensor] = dataclasses.field(default_factory=list)
    experts: list[torch.Tensor] = dataclasses.field(default_factory=list)


class Reference:
    """A model as a function from token ids to logits."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> None:
        """weights: canonical names (grokmoe.tensor_names) to tensors of any float type, in which they are kept."""
        self.config = config
        self._weights = weights

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, config: ModelConfig | None = None) -> Reference:
        """Reads all tensors. `config` replaces the checkpoint's own, to choose another variant."""
        weights = {name: checkpoint.read(name, torch.float32) for name in checkpoint.tensors}
        return cls(config or checkpoint.config, weights)

    def logits(self, token_ids: Sequence[int], trace: Trace | None = None) -> torch.Tensor:
        """Logits at every position [T, V], float32; fills `trace` if given."""
        trace = trace or Trace()
        h_TH = self._weight(names.embed())[list(token_ids)] * self.config.embedding_multiplier
        trace.hidden.append(h_TH)
        for layer in range(self.config.num_layers):
            a_TH = self._attention(layer, self._norm(h_TH, names.norm(layer, "pre_attn_norm")))
            h_TH = h_TH + self._norm(a_TH, names.norm(layer, "post_attn_norm"))
            m_TH = self._moe(layer, self._norm(h_TH, names.norm(layer, "pre_moe_norm")), trace)
            h_TH = h_TH + self._norm(m_TH, names.norm(layer, "post_moe_norm"))
            trace.hidden.append(h_TH)
        h_TH = self._norm(h_TH, names.final_norm())
        return h_TH @ self._weight(names.head(self.config)).T * self.config.output_multiplier

    def greedy(self, token_ids: Sequence[int], n: int) -> list[int]:
        """The next `n` tokens, each the one with the highest logit (the lowest id among equals)."""
        ids = list(token_ids)
        for _ in range(n):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(token_ids) :]

    def _weight(self, name: str) -> torch.Tensor:
        return self._weights[name].float()

    def _norm(self, x_TH: torch.Tensor, gain: str) -> torch.Tensor:
        mean_square_T1 = x_TH.square().mean(dim=-1, keepdim=True)
        return self._weight(gain) * (x_TH / torch.sqrt(mean_square_T1 + self.config.norm_eps))

    def _attention(self, layer: int, x_TH: torch.Tensor) -> torch.Tensor:
        config, T = self.config, len(x_TH)
        q_TQD = (x_TH @ self._weight(names.attention(layer, "q_proj")).T).view(T, config.num_heads, -1)
        k_TJD = (x_TH @ self._weight(names.attention(layer, "k_proj")).T).view(T, config.num_kv_heads, -1)
        v_TJD = (x_TH @ self._weight(names.attention(layer, "v_proj")).T).view(T, config.num_kv_heads, -1)
        q_TQD, k_TJD = rotate(q_TQD, config.rope_base), rotate(k_TJD, config.rope_base)

        group = config.num_heads // config.num_kv_heads  # query head q reads KV head q // group
        k_TQD, v_TQD = k_TJD.repeat_interleave(group, dim=1), v_TJD.repeat_interleave(group, dim=1)
        s_QTT = torch.einsum("tqd,sqd->qts", q_TQD, k_TQD) * config.attention_logit_scale
        s_QTT = cap(s_QTT, config.attention_cap)
        future_TT = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
        p_QTT = s_QTT.masked_fill(future_TT, -torch.inf).softmax(dim=-1)
        out_TQD = torch.einsum("qts,sqd->tqd", p_QTT, v_TQD)
        return (
            out_TQD.reshape(T, -1) @ self._weight(names.attention(layer, "o_proj")).T
        ) * config.attention_output_scale

    def _moe(self, layer: int, x_TH: torch.Tensor, trace: Trace) -> torch.Tensor:
        config = self.config
        z_TE = x_TH @ self._weight(names.gate(layer)).T
        if config.router_cap is not None:
            z_TE = cap(z_TE, config.router_cap)
        p_TE = z_TE.softmax(dim=-1)
        order_TE = p_TE.argsort(dim=-1, descending=True, stable=True)  # the lower id first among equals
        experts_TK = order_TE[:, : config.experts_per_token]
        gates_TK = p_TE.gather(1, experts_TK)
        if config.renormalize_gates:
            gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
        trace.router_logits.append(z_TE)
        trace.experts.append(experts_TK)

        out_TH = torch.zeros_like(x_TH)
        for expert_id in range(config.num_experts):
            token_N, rank_N = (experts_TK == expert_id).nonzero(as_tuple=True)
            if len(token_N):  # an expert nobody chose need not be read
                y_NH = self._expert(layer, expert_id, x_TH[token_N])
                out_TH[token_N] += gates_TK[token_N, rank_N, None] * y_NH
        return out_TH

    def _expert(self, layer: int, expert_id: int, x_NH: torch.Tensor) -> torch.Tensor:
        gate_NF = x_NH @ self._weight(names.expert(layer, expert_id, "linear")).T
        up_NF = x_NH @ self._weight(names.expert(layer, expert_id, "linear_v")).T
        gate_NF = torch.nn.functional.gelu(gate_NF, approximate="tanh" if self.config.gelu is Gelu.TANH else "none")
        return (gate_NF * up_NF) @ self._weight(names.expert(layer, expert_id, "linear_1")).T


def reference_logits(checkpoint: Checkpoint, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits [T, V] of a checkpoint in its own variant."""
    return Reference.from_checkpoint(checkpoint).logits(token_ids)


def cap(x: torch.Tensor, limit: float) -> torch.Tensor:
    """Soft cap: limit * tanh(x / limit)."""
    return limit * torch.tanh(x / limit)


def rotate(x_TQD: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary position embedding of positions 0 to T - 1, "neox" pairing: element i with i + D / 2."""
    T, _, D = x_TQD.shape
    frequency_D = base ** (-torch.arange(0, D, 2, dtype=torch.float32) / D).repeat(2)
    angle_T1D = torch.arange(T, dtype=torch.float32)[:, None, None] * frequency_D
    first, second = x_TQD.chunk(2, dim=-1)
    return x_TQD * angle_T1D.cos() + torch.cat((-second, first), dim=-1) * angle_T1D.sin()
