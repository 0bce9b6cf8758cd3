"""An attention worker's slice of a checkpoint: embedding, attention, norms and head of its layers, or one rank's part
of them. Expert weights are not touched.

Letters: V rows of the vocabulary, D hidden, Q query heads, J KV heads, all of a rank together.
"""

from __future__ import annotations

import dataclasses

import torch

from attention_worker.sharding import Shard
from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.linear import Linear, new_linear

SLICE_BYTES = 4 * 2**20
"""So much of a matrix is read at a time where only some of its columns are kept."""


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

    dtype: of the products. shard: the part of each that this rank has; norms are whole on each. layer_begin: the number
    of the first layer here.
    deterministic: whether they were packed so, and attention is to be computed so.
    """

    embedding_VD: torch.Tensor | None
    layers: tuple[LayerWeights, ...]
    final_norm_D: torch.Tensor | None
    head: Linear | None
    dtype: torch.dtype
    shard: Shard
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
    shard: Shard | None = None,
) -> AttentionWeights:
    """Reads and packs tensor by tensor; no more than one layer's projections exist twice at any time.

    held: the layers, at least one; None: all. shard: what to read of each; None: all of it.
    """
    config = checkpoint.config
    held = range(config.num_layers) if held is None else held
    shard = Shard.whole(config) if shard is None else shard
    query_rows, kv_rows = (_of_heads(heads, config.head_dim) for heads in (shard.query_heads, shard.kv_heads))

    def read(name: str, rows: slice) -> torch.Tensor:
        return checkpoint.read(name, dtype, rows).to(device)

    def gain(name: str) -> torch.Tensor:
        return checkpoint.read(name, torch.float32).to(device)

    def vocabulary(name: str) -> torch.Tensor:
        known = shard.known_rows(config.vocab_size)
        rows_VD = read(name, slice(known.start, known.stop))
        return torch.nn.functional.pad(rows_VD, (0, 0, 0, len(shard.vocabulary) - len(known)))

    embedding_VD = vocabulary(names.embed()) if held.start == 0 else None
    layers = []
    for layer in held:
        parts = (("q_proj", query_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
        qkv = torch.cat([read(names.attention(layer, part), rows) for part, rows in parts])
        o_proj = _read_columns(checkpoint, names.attention(layer, "o_proj"), dtype, query_rows).to(device)
        layers.append(
            LayerWeights(
                pre_attn_norm_D=gain(names.norm(layer, "pre_attn_norm")),
                post_attn_norm_D=gain(names.norm(layer, "post_attn_norm")),
                pre_moe_norm_D=gain(names.norm(layer, "pre_moe_norm")),
                post_moe_norm_D=gain(names.norm(layer, "post_moe_norm")),
                qkv=new_linear(qkv, deterministic),
                o_proj=new_linear(o_proj, deterministic, is_part=shard.size > 1),
            )
        )
    final_norm_D = head = None
    if held.stop == config.num_layers:
        final_norm_D = gain(names.final_norm())
        if not config.tie_word_embeddings:
            head_VD = vocabulary(names.head(config))
        else:
            head_VD = vocabulary(names.embed()) if embedding_VD is None else embedding_VD
        head = new_linear(head_VD, deterministic)
    return AttentionWeights(embedding_VD, tuple(layers), final_norm_D, head, dtype, shard, held.start, deterministic)


def _of_heads(heads: range, head_dim: int) -> slice:
    """Outputs of a projection, or inputs of the output projection."""
    return slice(heads.start * head_dim, heads.stop * head_dim)


def _read_columns(checkpoint: Checkpoint, name: str, dtype: torch.dtype, columns: slice) -> torch.Tensor:
    """Some inputs of a matrix, without ever holding it whole."""
    num_rows, num_columns = checkpoint.tensors[name].shape
    out = torch.empty(num_rows, columns.stop - columns.start, dtype=dtype)
    step = max(1, SLICE_BYTES // (num_columns * dtype.itemsize))
    for begin in range(0, num_rows, step):
        out[begin : begin + step] = checkpoint.read(name, dtype, slice(begin, begin + step))[:, columns]
    return out


def row_counts(weights: AttentionWeights) -> str:
    """The row counts that the products of a deterministic worker use, for the log."""
    layer = weights.layers[0]
    parts = {"qkv": layer.qkv, "o_proj": layer.o_proj}
    if weights.head is not None:
        parts["head"] = weights.head
    return "; ".join(f"{name} {','.join(map(str, linear.row_counts)) or 'any'}" for name, linear in parts.items())
