"""What llama.cpp's architecture `grok` calls the tensors, and the numbers of a file's header.

Sources: llama.cpp's loader of the architecture (`src/models/grok.cpp`) and `gguf`'s tables of names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grokmoe import tensor_names as names
from grokmoe.layouts.mapped_file import file_error
from grokmoe.model_config import GROK1, ModelConfig

ARCHITECTURE = "grok"

NORMS: dict[str, names.Norm] = {
    "attn_norm": "pre_attn_norm",
    "attn_output_norm": "post_attn_norm",
    "ffn_norm": "pre_moe_norm",
    "layer_output_norm": "post_moe_norm",
}
PROJECTIONS: dict[str, names.Projection] = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
}
EXPERTS: dict[str, names.ExpertLinear] = {
    "ffn_gate_exps": "linear",
    "ffn_up_exps": "linear_v",
    "ffn_down_exps": "linear_1",
}

OTHER_SPELLINGS = {"post_ffw_norm": "layer_output_norm"}
"""Newer files' names -> the ones above."""


@dataclasses.dataclass(frozen=True)
class NamedTensor:
    """One tensor of a file: one of ours, or one of each expert's, stacked."""

    name: str
    ours: tuple[str, ...]
    is_stacked: bool = False
    is_float32: bool = False
    """In files of llama.cpp's own conversion, whatever the type of the others."""


def tensors(config: ModelConfig) -> Iterator[NamedTensor]:
    """All of them, in the order of the forward pass. A tied head may have its own, or not be there."""
    yield NamedTensor("token_embd.weight", (names.embed(),))
    for layer in range(config.num_layers):
        prefix = f"blk.{layer}."
        for name, norm in NORMS.items():
            yield NamedTensor(f"{prefix}{name}.weight", (names.norm(layer, norm),), is_float32=True)
        for name, projection in PROJECTIONS.items():
            yield NamedTensor(f"{prefix}{name}.weight", (names.attention(layer, projection),))
        yield NamedTensor(f"{prefix}ffn_gate_inp.weight", (names.gate(layer),), is_float32=True)
        for name, linear in EXPERTS.items():
            experts = tuple(names.expert(layer, expert, linear) for expert in range(config.num_experts))
            yield NamedTensor(f"{prefix}{name}.weight", experts, is_stacked=True)
    yield NamedTensor("output_norm.weight", (names.final_norm(),), is_float32=True)
    yield NamedTensor("output.weight", (names.head(config),))


def usual_spelling(name: str) -> str:
    """A tensor's name in the spelling of `tensors`."""
    for other, usual in OTHER_SPELLINGS.items():
        name = name.replace(f".{other}.", f".{usual}.")
    return name


def fields(config: ModelConfig) -> dict[str, int | float]:
    """The numbers of a file's header, by the last part of their names: `grok.` stands before each."""
    return {
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.experts_per_token,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.output_scale": config.attention_logit_scale,
        "attn_logit_softcapping": config.attention_cap,
        "router_logit_softcapping": config.router_cap or 0.0,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_base,
        "embedding_scale": config.embedding_multiplier,
        "logit_scale": config.output_multiplier,
    }


def config_from(found: Mapping[str, Any], vocab_size: int, is_tied: bool, path: Path) -> dict[str, Any]:
    """The keys of a config.json that say what a file's header says. Raises CheckpointError without a number.

    found: the fields of the header. What older files do not say is what llama.cpp takes it to be: Grok-1's.
    """

    def number(name: str, default: float | None = None) -> Any:
        value = found.get(f"{ARCHITECTURE}.{name}", default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise file_error(path, f"a number for {ARCHITECTURE}.{name}", value)
        return value

    heads, width = number("attention.head_count"), number("feed_forward_length")
    raw = {
        "architectures": ["Grok1ModelForCausalLM"],
        "model_type": "grok-1",
        "vocab_size": vocab_size,
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("expert_feed_forward_length", width),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "num_experts": number("expert_count"),
        "num_experts_per_tok": number("expert_used_count"),
        "max_position_embeddings": number("context_length"),
        "tie_word_embeddings": is_tied,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "embedding_multiplier_scale": number("embedding_scale", GROK1.embedding_multiplier),
        "output_multiplier_scale": number("logit_scale", GROK1.output_multiplier),
        "attn_output_multiplier": number("attention.output_scale", GROK1.attention_logit_scale),
        "max_attn_value": number("attn_logit_softcapping", GROK1.attention_cap),
    }
    if f"{ARCHITECTURE}.attention.key_length" in found:
        raw["head_dim"] = number("attention.key_length")
    for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        if isinstance(token := found.get(f"tokenizer.ggml.{name}_token_id"), int):
            raw[key] = token
    return raw
