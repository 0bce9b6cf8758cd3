"""The adapters of tests/data/lora, which PEFT has saved, and what the model says with weights that PEFT has merged."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent / "data" / "lora"
NAMES = ("qv", "all", "tokens")
"""Two projections of rank 4; all four, rank-stabilised, with patterns; with five added tokens."""

_GOLDENS: dict[str, Any] = json.loads((FOLDER / "goldens.json").read_text())


def prompt(name: str) -> list[int]:
    """The prompt of an adapter's goldens."""
    ids: list[int] = _GOLDENS[name]["prompt"]
    return ids


def greedy(name: str) -> list[int]:
    """The 16 tokens that follow it with the adapter."""
    ids: list[int] = _GOLDENS[name]["tokens"]
    return ids


@functools.cache
def _logits() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "goldens.safetensors")


def logits(name: str) -> torch.Tensor:
    """Logits of the prompt [T, V + added], float32."""
    return _logits()[name]


def changed(
    target: Path,
    name: str = "qv",
    config: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, torch.Tensor]], object] | None = None,
) -> Path:
    """A copy of an adapter at `target`, with entries of its configuration replaced and its tensors changed in place."""
    shutil.copytree(FOLDER / name, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    if tensors is not None:
        path = target / "adapter_model.safetensors"
        loaded = load_file(path)
        tensors(loaded)
        save_file({key: value.contiguous() for key, value in loaded.items()}, path)
    return target
