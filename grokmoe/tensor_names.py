"""The names of a checkpoint's tensors and the shape each must have; no other module puts such a name together.

Canonical names are those of docs/numerics.md. What others call the tensors is in `grokmoe.layouts`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

from grokmoe.model_config import ModelConfig

Norm = Literal["pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj"]
ExpertLinear = Literal["linear", "linear_v", "linear_1"]

NORMS: tuple[Norm, ...] = ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm")
PROJECTIONS: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_LINEARS: tuple[ExpertLinear, ...] = ("linear", "linear_v", "linear_1")
"""The gelu side, the up side, the down side."""

_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_EXPERT = re.compile(r"model\.layers\.\d{1,9}\.moe_block\.experts\.(\d{1,9})\.")
_GATE = re.compile(r"model\.layers\.\d{1,9}\.moe_block\.gate\.weight")


def embed() -> str:
    """Token embedding [V, H]."""
    return "model.embed_tokens.weight"


def final_norm() -> str:
    """Gain of the norm before the head [H]."""
    return "model.norm.scale"


def head(config: ModelConfig) -> str:
    """The tensor the head multiplies with [V, H]: the embedding when tied."""
    return embed() if config.tie_word_embeddings else "lm_head.weight"


def norm(layer: int, kind: Norm) -> str:
    """Gain of one of a layer's four norms [H]."""
    return f"model.layers.{layer}.{kind}.scale"


def attention(layer: int, projection: Projection) -> str:
    """A projection of attention, [out, in]."""
    return f"model.layers.{layer}.attn.{projection}.weight"


def gate(layer: int) -> str:
    """The router's matrix [E, H]."""
    return f"model.layers.{layer}.moe_block.gate.weight"


def expert(layer: int, expert_id: int, linear: ExpertLinear) -> str:
    """One of an expert's three matrices: `linear` and `linear_v` [F, H], `linear_1` [H, F]."""
    return f"model.layers.{layer}.moe_block.experts.{expert_id}.{linear}.weight"


def is_gate(name: str) -> bool:
    """Whether it is a router's matrix."""
    return _GATE.fullmatch(name) is not None


def is_ignorable(name: str, config: ModelConfig) -> bool:
    """Whether a file may hold this tensor although nothing reads it."""
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def layer_of(name: str) -> int | None:
    """The layer a name belongs to, None for embedding, final norm, head and foreign names."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def expert_of(name: str) -> int | None:
    """The expert a name belongs to, None for what is no expert's."""
    match = _EXPERT.match(name)
    return int(match[1]) if match else None


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a checkpoint must hold under one canonical name.

    part: "embedding", "head", "attention", "gate", "experts" or "norms".
    meaning: the shape in words of config.json.
    """

    name: str
    shape: tuple[int, ...]
    part: str
    meaning: str


def expected(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of a model of this shape, in the order of the forward pass."""
    hidden, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    attention_shapes: dict[Projection, tuple[tuple[int, int], str]] = {
        "q_proj": ((config.query_size, hidden), "num_attention_heads * head_dim, hidden_size"),
        "k_proj": ((config.kv_size, hidden), "num_key_value_heads * head_dim, hidden_size"),
        "v_proj": ((config.kv_size, hidden), "num_key_value_heads * head_dim, hidden_size"),
        "o_proj": ((hidden, config.query_size), "hidden_size, num_attention_heads * head_dim"),
    }
    expert_shapes: dict[ExpertLinear, tuple[tuple[int, int], str]] = {
        "linear": ((ffn, hidden), "intermediate_size, hidden_size"),
        "linear_v": ((ffn, hidden), "intermediate_size, hidden_size"),
        "linear_1": ((hidden, ffn), "hidden_size, intermediate_size"),
    }
    yield TensorSpec(embed(), (vocab, hidden), "embedding", "vocab_size, hidden_size")
    for layer in range(config.num_layers):
        for kind in NORMS:
            yield TensorSpec(norm(layer, kind), (hidden,), "norms", "hidden_size")
        for projection, (shape, meaning) in attention_shapes.items():
            yield TensorSpec(attention(layer, projection), shape, "attention", meaning)
        yield TensorSpec(gate(layer), (config.num_experts, hidden), "gate", "num_experts, hidden_size")
        for expert_id in range(config.num_experts):
            for linear, (shape, meaning) in expert_shapes.items():
                yield TensorSpec(expert(layer, expert_id, linear), shape, "experts", meaning)
    yield TensorSpec(final_norm(), (hidden,), "norms", "hidden_size")
    if not config.tie_word_embeddings:
        yield TensorSpec(head(config), (vocab, hidden), "head", "vocab_size, hidden_size")
