"""Grok-1's forward pass as a trainable torch module, for the demo model.

Parameters carry their checkpoint names, so `state_dict()` is the checkpoint. The function is the service's
default variant: erf GELU, router cap, renormalised top-k weights, attention logits scaled by d^-1/2, capped.

Shapes: B sequences, T positions, N = B * T tokens, H hidden, Q query heads, K KV heads, g query heads per KV
head, D head size, E experts, C experts chosen per token, n tokens of one expert, V vocabulary.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

ROUTER_CAP = 30.0
ROPE_BASE = 10000.0


@dataclass(frozen=True)
class NetworkConfig:
    """The part of config.json that the forward pass reads, spelled as there."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_experts: int
    num_experts_per_tok: int
    embedding_multiplier_scale: float
    output_multiplier_scale: float
    attn_output_multiplier: float
    max_attn_value: float
    rms_norm_eps: float
    max_position_embeddings: int

    @classmethod
    def read(cls, folder: Path) -> "NetworkConfig":
        """The configuration in `folder`/config.json; its other keys are ignored."""
        return cls.from_dict(json.loads((folder / "config.json").read_text()))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "NetworkConfig":
        """The configuration in the values of a config.json."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    @property
    def head_size(self) -> int:
        """D, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Routing:
    """What one layer's router did with N tokens."""

    counts_E: Tensor  # int64, choices per expert; sums to N * C
    mean_probs_E: Tensor  # float32, mean softmax probability per expert; carries gradient


def cap(x: Tensor, limit: float) -> Tensor:
    """`limit * tanh(x / limit)`, elementwise."""
    return limit * torch.tanh(x / limit)


class Gain(nn.Module):
    """RMS norm with a plain gain: [..., H] to float32 [..., H]."""

    def __init__(self, size: int, eps: float, initial: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.full((size,), initial))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return self.scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def rope_tables(num_positions: int, head_size: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each float32 [T, D], the D/2 angles repeated for the two halves of a head."""
    frequencies = ROPE_BASE ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x_BnTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """RoPE in the "neox" pairing, dimension i with i + D/2."""
    low, high = x_BnTD.chunk(2, dim=-1)
    return x_BnTD * cos_TD + torch.cat((-high, low), dim=-1) * sin_TD


class Attention(nn.Module):
    """Causal grouped-query attention: [B, T, H] to [B, T, H]."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        kv_size = config.num_key_value_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        config, (B, T, H) = self.config, x_BTH.shape
        q_BQTD, k_BKTD, v_BKTD = (
            projection(x_BTH).view(B, T, -1, config.head_size).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        # The scale goes into q (T * D values) rather than into the scores (T * T).
        q_BQTD = rotate(q_BQTD, cos_TD, sin_TD) * config.head_size**-0.5
        k_BKTD = rotate(k_BKTD, cos_TD, sin_TD)
        # The query heads of one KV head are rows of one matrix: k and v are never copied per query head.
        group = config.num_attention_heads // config.num_key_value_heads
        q_BKgTD = q_BQTD.reshape(B, config.num_key_value_heads, group * T, config.head_size)
        scores = cap((q_BKgTD @ k_BKTD.transpose(-1, -2)).float(), config.max_attn_value)
        future_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores = scores.view(B, -1, T, T).masked_fill(future_TT, -torch.inf)
        probs = scores.softmax(-1).view(B, config.num_key_value_heads, group * T, T)
        mixed_BQTD = (probs @ v_BKTD).view(B, config.num_attention_heads, T, config.head_size)
        return self.o_proj(mixed_BQTD.transpose(1, 2).reshape(B, T, H)) * config.attn_output_multiplier


class Expert(nn.Module):
    """Gated feed-forward: [n, H] to [n, H]."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.linear_v = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.linear_1 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_nH: Tensor) -> Tensor:
        return self.linear_1(functional.gelu(self.linear(x_nH)) * self.linear_v(x_nH))


class MoEBlock(nn.Module):
    """Dropless top-C mixture of experts: [N, H] to [N, H] and its routing."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_experts))

    def forward(self, x_NH: Tensor) -> tuple[Tensor, Routing]:
        with torch.autocast("cpu", enabled=False):  # the router is float32 everywhere
            probs_NE = cap(self.gate(x_NH.float()), ROUTER_CAP).softmax(-1)
        weights_NC, experts_NC = probs_NE.topk(self.top_k, dim=-1)
        weights_NC = weights_NC / weights_NC.sum(-1, keepdim=True)

        counts_E = torch.bincount(experts_NC.flatten(), minlength=len(self.experts))
        order = experts_NC.flatten().argsort(stable=True)  # (token, choice) pairs, grouped by expert
        rows = order // self.top_k
        groups = x_NH.index_select(0, rows).split(counts_E.tolist())
        done = torch.cat([expert(group) for expert, group in zip(self.experts, groups, strict=True)])
        weighted = done.float() * weights_NC.flatten().index_select(0, order).unsqueeze(-1)
        out_NH = torch.zeros(x_NH.shape, dtype=torch.float32).index_add(0, rows, weighted)
        return out_NH, Routing(counts_E, probs_NE.mean(0))


class Layer(nn.Module):
    """Attention and mixture, each between two norms: [B, T, H] to [B, T, H] and the routing."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        # The norm after a sub-block sets the size of its step: the 2 * layers steps together start at size 1.
        step = (2 * config.num_hidden_layers) ** -0.5
        self.pre_attn_norm = Gain(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.post_attn_norm = Gain(config.hidden_size, config.rms_norm_eps, step)
        self.pre_moe_norm = Gain(config.hidden_size, config.rms_norm_eps)
        self.moe_block = MoEBlock(config)
        self.post_moe_norm = Gain(config.hidden_size, config.rms_norm_eps, step)

    def forward(self, h_BTH: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Routing]:
        attended_BTH = self.attn(self.pre_attn_norm(h_BTH), cos_TD, sin_TD)
        h_BTH = h_BTH + self.post_attn_norm(attended_BTH)
        mixed_NH, routing = self.moe_block(self.pre_moe_norm(h_BTH).flatten(0, 1))
        return h_BTH + self.post_moe_norm(mixed_NH).view_as(h_BTH), routing


class Network(nn.Module):
    """Tokens int64 [B, T] to logits [B, T, V] and each layer's routing; the head is the embedding."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = Gain(config.hidden_size, config.rms_norm_eps)
        self.cos, self.sin = rope_tables(config.max_position_embeddings, config.head_size)
        self.apply(_initialise)

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, list[Routing]]:
        cos_TD, sin_TD = self.cos[: tokens_BT.shape[1]], self.sin[: tokens_BT.shape[1]]
        h_BTH = self.model.embed_tokens(tokens_BT) * self.config.embedding_multiplier_scale
        routings = []
        for layer in self.model.layers:
            h_BTH, routing = layer(h_BTH, cos_TD, sin_TD)
            routings.append(routing)
        logits_BTV = functional.linear(self.model.norm(h_BTH), self.model.embed_tokens.weight)
        return logits_BTV.float() * self.config.output_multiplier_scale, routings


def _initialise(module: nn.Module) -> None:
    """Unit-variance outputs for unit-variance inputs; an embedding row has length 1 in expectation."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)


def balance_loss(routings: list[Routing]) -> Tensor:
    """Mean over layers of E * sum_e(share of choices_e * mean probability_e); 1 when all are used alike.

    This is the auxiliary loss of Switch Transformers (Fedus et al., 2021, eq. 4), counted over all C choices.
    """
    losses = []
    for routing in routings:
        share_E = routing.counts_E / routing.counts_E.sum()
        losses.append(len(share_E) * (share_E * routing.mean_probs_E).sum())
    return torch.stack(losses).mean()


def load_network(folder: Path) -> Network:
    """The float32 network of a checkpoint folder (config.json, model.safetensors), in evaluation mode."""
    network = Network(NetworkConfig.read(folder))
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network.eval()


def save_network(network: Network, folder: Path, config: dict[str, Any]) -> None:
    """Write config.json and the weights, rounded to bfloat16, as model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def golden_error(folder: Path) -> float:
    """Largest absolute difference from the reference logits kept beside the checkpoint in `folder`."""
    network = load_network(folder)
    prompts = json.loads((folder / "goldens.json").read_text())["prompts"]
    goldens = load_file(folder / "goldens.safetensors")
    worst = 0.0
    for name, tokens in prompts.items():
        logits_BTV, _ = network(torch.tensor([tokens]))
        worst = max(worst, (logits_BTV[0] - goldens[f"reference.seed.{name}"]).abs().max().item())
    return worst if math.isfinite(worst) else math.inf
