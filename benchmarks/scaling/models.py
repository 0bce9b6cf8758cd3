"""Models of any size with random weights, made when they are needed and kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.step.topologies import random_model
from grokmoe.model_config import BENCH, ModelConfig

SMALL = dataclasses.replace(
    BENCH,
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=512,
    num_layers=4,
    num_heads=4,
    num_kv_heads=1,
    head_dim=64,
    attention_logit_scale=0.0,  # as the size of the heads has it
)
"""As large as the embedded demo model, with a context long enough for every prompt."""

PRESETS = {"demo": SMALL, "bench": BENCH}


class Models:
    """Of one preset, with other numbers of layers."""

    def __init__(self, preset: str, cache: Path) -> None:
        self._preset, self._cache = preset, cache

    @property
    def config(self) -> ModelConfig:
        """Of the preset as it is."""
        return PRESETS[self._preset]

    def with_layers(self, num_layers: int) -> Path:
        """The directory of the model with so many layers."""
        config = dataclasses.replace(self.config, num_layers=num_layers)
        name = self._preset if config == BENCH else f"scaling-{self._preset}-{num_layers}"
        return random_model(self._cache / name, config)

    @property
    def directory(self) -> Path:
        """Of the preset as it is."""
        return self.with_layers(self.config.num_layers)


def stored_bytes(directory: Path) -> int:
    """Of a checkpoint's tensors."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
