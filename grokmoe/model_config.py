"""What a model of Grok-1's architecture is: sizes, constants and the points where implementations disagree.

Knows nothing of tensors or devices, and does not import torch. The equations are in docs/numerics.md.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grokmoe.config_keys import KeyReader, read_json_object
from grokmoe.errors import ConfigError


class Gelu(enum.StrEnum):
    """Which form of GELU the experts use."""

    ERF = "erf"
    TANH = "tanh"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one model. Frozen and validated; equal content has an equal `content_hash`.

    The last block holds the points where implementations disagree. Its defaults are vLLM's `Grok1ForCausalLM`;
    `as_variant("xai")` gives those of xai-org/grok-1.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    context_length: int
    tie_word_embeddings: bool = True
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    embedding_multiplier: float = 1.0
    output_multiplier: float = 1.0
    attention_cap: float = 30.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    gelu: Gelu = Gelu.ERF
    router_cap: float | None = 30.0
    renormalize_gates: bool = True
    attention_output_scale: float = 1.0
    attention_logit_scale: float = 0.0  # set to head_dim ** -0.5 when left at 0

    def __post_init__(self) -> None:
        if self.attention_logit_scale == 0.0:
            object.__setattr__(self, "attention_logit_scale", self.head_dim**-0.5)
        self._validate()

    def _validate(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "num_experts",
            "experts_per_token",
            "context_length",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in (
            "norm_eps",
            "rope_base",
            "embedding_multiplier",
            "output_multiplier",
            "attention_cap",
            "attention_output_scale",
            "attention_logit_scale",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}, must be finite and above 0")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}, must be even (rotary pairs)")
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"experts_per_token ({self.experts_per_token}) must not exceed num_experts ({self.num_experts})"
            )
        if self.router_cap is not None and not (math.isfinite(self.router_cap) and self.router_cap > 0):
            raise ConfigError(f"router_cap is {self.router_cap}, must be finite and above 0, or absent")
        for name, ids in (("bos_token_id", (self.bos_token_id,)), ("eos_token_id", self.eos_token_ids)):
            for token_id in ids:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ConfigError(f"{name} is {token_id}, must be below vocab_size ({self.vocab_size})")

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all KV heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def content_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of all fields; roles compare it when they connect."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def as_variant(self, name: str, attn_output_multiplier: float | None = None) -> ModelConfig:
        """The same model with another implementation's choices.

        name: "vllm" (the default form) or "xai" (xai-org/grok-1).
        attn_output_multiplier: the value of that key in config.json, if it has the key. vLLM multiplies the output
        of o_proj by it; xAI multiplies the attention logits.
        """
        if name == "vllm":
            return dataclasses.replace(
                self,
                gelu=Gelu.ERF,
                router_cap=30.0,
                renormalize_gates=True,
                attention_output_scale=1.0 if attn_output_multiplier is None else attn_output_multiplier,
                attention_logit_scale=self.head_dim**-0.5,
            )
        if name == "xai":
            return dataclasses.replace(
                self,
                gelu=Gelu.TANH,
                router_cap=None,
                renormalize_gates=False,
                attention_output_scale=1.0,
                attention_logit_scale=(
                    self.head_dim**-0.5 if attn_output_multiplier is None else attn_output_multiplier
                ),
            )
        raise ConfigError(f"variant is {name!r}, must be 'vllm' or 'xai'")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], variant: str = "vllm") -> ModelConfig:
        """Reads the keys of a Hugging Face style `config.json`.

        Raises ConfigError naming the key when one is missing, has the wrong type or contradicts another.
        """
        reader = KeyReader(raw)
        num_heads = reader.integer("num_attention_heads")
        hidden_size = reader.integer("hidden_size")
        if num_heads < 1 or (hidden_size % num_heads and "head_dim" not in raw):
            raise ConfigError(f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_heads})")
        base = cls(
            vocab_size=reader.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.integer("intermediate_size"),
            num_layers=reader.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=reader.integer("num_key_value_heads", default=num_heads),
            head_dim=reader.integer("head_dim", default=hidden_size // num_heads),
            num_experts=reader.integer("num_experts", "num_local_experts"),
            experts_per_token=reader.integer("num_experts_per_tok", default=2),
            context_length=reader.integer("max_position_embeddings", default=8192),
            tie_word_embeddings=reader.boolean("tie_word_embeddings", default=True),
            norm_eps=reader.number("rms_norm_eps", default=1e-5),
            rope_base=reader.number("rope_theta", default=10000.0),
            embedding_multiplier=reader.number("embedding_multiplier_scale", default=1.0),
            output_multiplier=reader.number("output_multiplier_scale", default=1.0),
            attention_cap=reader.number("attn_logit_softcapping", "max_attn_value", default=30.0),
            bos_token_id=reader.optional_integer("bos_token_id"),
            eos_token_ids=reader.integers("eos_token_id"),
        )
        multiplier = None
        if raw.get("attn_output_multiplier") is not None:
            multiplier = reader.number("attn_output_multiplier")
        config = base.as_variant(variant, multiplier)
        if raw.get("router_logit_softcapping") is not None and config.router_cap is not None:
            config = dataclasses.replace(config, router_cap=reader.number("router_logit_softcapping"))
        return config

    def to_dict(self, variant: str = "vllm") -> dict[str, Any]:
        """The keys of `config.json` that `from_dict` with the same variant reads back to an equal config.

        variant: the form this config has, see `as_variant`. attn_output_multiplier means what it means there.
        Raises ConfigError naming the fields in which this config is not of that form: config.json has no keys for
        the GELU form and the like, they follow from the variant alone.
        """
        raw: dict[str, Any] = {
            "architectures": ["Grok1ModelForCausalLM"],
            "model_type": "grok-1",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.experts_per_token,
            "max_position_embeddings": self.context_length,
            "tie_word_embeddings": self.tie_word_embeddings,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_base,
            "embedding_multiplier_scale": self.embedding_multiplier,
            "output_multiplier_scale": self.output_multiplier,
            "max_attn_value": self.attention_cap,
            "attn_output_multiplier": (self.attention_logit_scale if variant == "xai" else self.attention_output_scale),
        }
        if self.router_cap not in (None, 30.0):
            raw["router_logit_softcapping"] = self.router_cap
        if self.bos_token_id is not None:
            raw["bos_token_id"] = self.bos_token_id
        if self.eos_token_ids:
            raw["eos_token_id"] = self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids)
        read_back = self.from_dict(raw, variant)
        differing = [
            field.name
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(read_back, field.name)
        ]
        if differing:
            raise ConfigError(f"config.json of variant {variant!r} cannot express this {', '.join(differing)}")
        return raw

    @classmethod
    def from_file(cls, path: str | Path, variant: str = "vllm") -> ModelConfig:
        """Reads `config.json`, given its path or its directory."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        raw = read_json_object(path)
        try:
            return cls.from_dict(raw, variant)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.message}") from error


GROK1 = ModelConfig(
    vocab_size=131072,
    hidden_size=6144,
    intermediate_size=32768,
    num_layers=64,
    num_heads=48,
    num_kv_heads=8,
    head_dim=128,
    num_experts=8,
    experts_per_token=2,
    context_length=8192,
    embedding_multiplier=78.38367176906169,
    output_multiplier=0.5773502691896257,
    bos_token_id=1,
    eos_token_ids=(2,),
    attention_output_scale=0.08838834764831845,
)
"""The released model."""

TINY = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_experts=8,
    experts_per_token=2,
    context_length=256,
    embedding_multiplier=8.0,
    output_multiplier=0.5773502691896257,
)
"""For tests: random weights of this shape load in milliseconds."""

BENCH = ModelConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=4096,
    num_layers=8,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    num_experts=8,
    experts_per_token=2,
    context_length=8192,
    tie_word_embeddings=False,
    embedding_multiplier=78.38367176906169,
    output_multiplier=0.5773502691896257,
)
"""For measurements on two cores: 0.89 billion parameters, of which a token reads 0.26; heads as wide as Grok-1's."""
