"""The goldens of tests/data/tiny-a: a small checkpoint, prompts, and what implementations make of them.

A variant is a set of choices on which implementations differ: "seed" is the default (vLLM's), the others are named
after xai-org/grok-1, the Hugging Face port, SGLang and llama.cpp. An oracle is a program written by others that was
run on this checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from grokmoe.model_config import Gelu, ModelConfig

DIRECTORY = Path(__file__).parent / "data" / "tiny-a"

_GOLDENS: dict[str, Any] = json.loads((DIRECTORY / "goldens.json").read_text())
_ORACLES: dict[str, Any] = json.loads((DIRECTORY / "oracles.json").read_text())

PROMPTS: dict[str, list[int]] = _GOLDENS["prompts"]
VARIANTS: tuple[str, ...] = tuple(_GOLDENS["greedy"])
ORACLES: dict[str, str] = {name: entry["compare_with_variant"] for name, entry in _ORACLES.items()}
"""Oracle -> the variant it implements."""
TRACE_PROMPT: str = _GOLDENS["trace_prompt"]


def config(variant: str = "seed") -> ModelConfig:
    """The checkpoint's config with the choices of one of VARIANTS."""
    if variant in ("seed", "xai"):
        return ModelConfig.from_file(DIRECTORY, "vllm" if variant == "seed" else "xai")
    choices: dict[str, dict[str, Any]] = {
        "sglang": {"gelu": Gelu.ERF, "router_cap": 30.0, "renormalize_gates": False},
        "hf": {"gelu": Gelu.ERF, "router_cap": None, "renormalize_gates": False},
        "llamacpp": {"gelu": Gelu.TANH, "router_cap": None, "renormalize_gates": True},
    }
    return dataclasses.replace(config("seed"), attention_output_scale=1.0, **choices[variant])


@functools.cache
def _tensors(file: str) -> dict[str, torch.Tensor]:
    return load_file(DIRECTORY / file)


def has_logits(variant: str) -> bool:
    """Whether there are reference logits of a variant; of the others there are tokens, and for some an oracle."""
    return f"reference.{variant}.len1" in _tensors("goldens.safetensors")


def logits(variant: str, prompt: str) -> torch.Tensor:
    """Float64 reference logits [T, V], stored as float32. An exact float32 implementation is within 1e-4."""
    return _tensors("goldens.safetensors")[f"reference.{variant}.{prompt}"]


def oracle_logits(oracle: str, prompt: str) -> torch.Tensor:
    """Logits [T, V] of a program written by others, float32."""
    return _tensors("oracles.safetensors")[f"oracle.{oracle}.{prompt}"]


def trace(what: str) -> torch.Tensor:
    """Inside variant "seed" on TRACE_PROMPT: "hidden" [L + 1, T, H], "router_logits" [L, T, E], "experts" [L, T, K]."""
    return _tensors("goldens.safetensors")[f"trace.{what}"]


def greedy(variant: str, prompt: str) -> list[int]:
    """The 16 tokens that follow a prompt."""
    tokens: list[int] = _GOLDENS["greedy"][variant][prompt]["tokens"]
    return tokens


def greedy_gap(variant: str, prompt: str) -> float:
    """The smallest distance of the best logit to the second best on the way to `greedy`."""
    return float(_GOLDENS["greedy"][variant][prompt]["min_logit_gap"])


def oracle_greedy(oracle: str, prompt: str) -> list[int]:
    """The 16 tokens that program generated."""
    tokens: list[int] = _ORACLES[oracle]["greedy"][prompt]
    return tokens
