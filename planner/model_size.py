"""What a model weighs and what its parts compute, in bytes and floating-point operations."""

from __future__ import annotations

from grokmoe.errors import ConfigError
from grokmoe.model_config import ModelConfig

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}
"""Bytes of a weight, by the type it is kept in."""

SCALE_SHARE = 0.01
"""Of weights in FP8: what their scales add, on the high side."""


def weight_bytes(dtype: str) -> int:
    """Bytes of a weight. Raises ConfigError for a type that is none of them."""
    if dtype not in WEIGHT_BYTES:
        raise ConfigError(f"dtype is {dtype!r}, must be one of {', '.join(WEIGHT_BYTES)}")
    return WEIGHT_BYTES[dtype]


def expert_params(config: ModelConfig) -> int:
    """Weights of one expert in one layer: three matrices."""
    return 3 * config.hidden_size * config.intermediate_size


def expert_bytes(config: ModelConfig, dtype: str) -> float:
    """Memory of one expert in one layer, scales included."""
    return expert_params(config) * weight_bytes(dtype) * (1 + SCALE_SHARE if dtype == "float8" else 1)


def qkv_params(config: ModelConfig) -> int:
    """Weights of queries, keys and values in one layer."""
    return config.hidden_size * (config.query_size + 2 * config.kv_size)


def out_params(config: ModelConfig) -> int:
    """Weights of the projection after attention."""
    return config.query_size * config.hidden_size


def projection_params(config: ModelConfig) -> int:
    """Weights of attention in one layer."""
    return qkv_params(config) + out_params(config)


def head_params(config: ModelConfig) -> int:
    """Weights of the head; the embedding has as many."""
    return config.vocab_size * config.hidden_size


def kv_bytes(config: ModelConfig, dtype: str) -> int:
    """Keys and values of one position in all layers."""
    return 2 * config.num_layers * config.kv_size * weight_bytes(dtype)


def all_params(config: ModelConfig) -> int:
    """Weights of the whole model, the norms and the gates left out; a tied embedding counts once."""
    embedding = head_params(config) * (1 if config.tie_word_embeddings else 2)
    layer = projection_params(config) + config.num_experts * expert_params(config)
    return config.num_layers * layer + embedding
