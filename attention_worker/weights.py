"""An attention worker's slice of a checkpoint: embedding, attention, norms and head. Expert weights are not touched.

Letters: V vocabulary, D hidden, Q all query heads, J all KV heads together.
"""

from __future__ import annotations

import dataclasses

import torch

from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.linear import Linear, new_linear


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One layer. Norm gains are float32; qkv is the three projections in one, [Q + 2J, D]."""

    pre_attn_norm_D: torch.Tensor
    post_attn_norm_D: torch.Tensor
    pre_moe_norm_D: torch.Tensor
    post_moe_norm_D: torch.Tensor
    qkv: Linear
    o_proj: Linear


@dataclasses.dataclass(frozen=True)
class AttentionWeights:
    """All layers, the embedding table and the head.

    deterministic: whether they were packed so, and attention is to be computed so.
    """

    embedding_VD: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm_D: torch.Tensor
    head: Linear
    deterministic: bool = False


def load_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, deterministic: bool = False
) -> AttentionWeights:
    """Reads and packs tensor by tensor; no more than one layer's projections exist twice at any time."""

    def read(name: str, dtype: torch.dtype = dtype) -> torch.Tensor:
        return checkpoint.read(name, dtype).to(device)

    def gain(name: str) -> torch.Tensor:
        return read(name, torch.float32)

    config = checkpoint.config
    embedding_VD = read(names.embed())
    layers = []
    for layer in range(config.num_layers):
        qkv = torch.cat([read(names.attention(layer, part)) for part in ("q_proj", "k_proj", "v_proj")])
        layers.append(
            LayerWeights(
                pre_attn_norm_D=gain(names.norm(layer, "pre_attn_norm")),
                post_attn_norm_D=gain(names.norm(layer, "post_attn_norm")),
                pre_moe_norm_D=gain(names.norm(layer, "pre_moe_norm")),
                post_moe_norm_D=gain(names.norm(layer, "post_moe_norm")),
                qkv=new_linear(qkv, deterministic),
                o_proj=new_linear(read(names.attention(layer, "o_proj")), deterministic),
            )
        )
    head_VD = embedding_VD if config.tie_word_embeddings else read(names.head(config))
    head = new_linear(head_VD, deterministic)
    return AttentionWeights(embedding_VD, tuple(layers), gain(names.final_norm()), head, deterministic)


def row_counts(weights: AttentionWeights) -> str:
    """The row counts that the products of a deterministic worker use, for the log."""
    layer = weights.layers[0]
    parts = {"qkv": layer.qkv, "o_proj": layer.o_proj, "head": weights.head}
    return "; ".join(f"{name} {','.join(map(str, linear.row_counts)) or 'any'}" for name, linear in parts.items())
