"""An attention worker's slice of a checkpoint: embedding, attention, norms and head of its layers. Expert weights are
not touched.

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
    """Some layers in a row, or all; the embedding table with the first of the model, final norm and head with the last.

    dtype: of the products. layer_begin: the number of the first layer here.
    deterministic: whether they were packed so, and attention is to be computed so.
    """

    embedding_VD: torch.Tensor | None
    layers: tuple[LayerWeights, ...]
    final_norm_D: torch.Tensor | None
    head: Linear | None
    dtype: torch.dtype
    layer_begin: int = 0
    deterministic: bool = False

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.layers[0].pre_attn_norm_D.device

    @property
    def held(self) -> range:
        """The numbers of the layers."""
        return range(self.layer_begin, self.layer_begin + len(self.layers))


def load_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    deterministic: bool = False,
    held: range | None = None,
) -> AttentionWeights:
    """Reads and packs tensor by tensor; no more than one layer's projections exist twice at any time.

    held: the layers, at least one; None: all.
    """

    def read(name: str, dtype: torch.dtype = dtype) -> torch.Tensor:
        return checkpoint.read(name, dtype).to(device)

    def gain(name: str) -> torch.Tensor:
        return read(name, torch.float32)

    config = checkpoint.config
    held = range(config.num_layers) if held is None else held
    embedding_VD = read(names.embed()) if held.start == 0 else None
    layers = []
    for layer in held:
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
    final_norm_D = head = None
    if held.stop == config.num_layers:
        final_norm_D = gain(names.final_norm())
        if not config.tie_word_embeddings:
            head_VD = read(names.head(config))
        else:
            head_VD = read(names.embed()) if embedding_VD is None else embedding_VD
        head = new_linear(head_VD, deterministic)
    return AttentionWeights(embedding_VD, tuple(layers), final_norm_D, head, dtype, held.start, deterministic)


def row_counts(weights: AttentionWeights) -> str:
    """The row counts that the products of a deterministic worker use, for the log."""
    layer = weights.layers[0]
    parts = {"qkv": layer.qkv, "o_proj": layer.o_proj}
    if weights.head is not None:
        parts["head"] = weights.head
    return "; ".join(f"{name} {','.join(map(str, linear.row_counts)) or 'any'}" for name, linear in parts.items())
