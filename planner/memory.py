"""What fits: memory of an expert worker and of an attention worker, item by item, in GiB."""

from __future__ import annotations

import dataclasses
import math

from grokmoe.errors import ConfigError
from grokmoe.model_config import ModelConfig
from planner.device import GIB, Device
from planner.model_size import expert_bytes, head_params, kv_bytes, projection_params, weight_bytes

CONTEXT_GIB = {"cuda": 1.5, "cpu": 1.0}
"""CUDA's context and what its allocator cannot use; torch and Python on a host. On the high side."""

ACTIVATIONS_GIB = 4.0
"""Of an attention worker: hidden states, logits, queries of the largest step."""

FULL = 0.95
"""Share of a device's memory that is planned for."""

BATCH_ROWS = 8192
"""Rows that an expert worker takes together, at most."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Items in GiB, and what the device has."""

    weights: float
    kv: float
    rows: float
    runtime: float
    device: float

    @property
    def need(self) -> float:
        """All of them."""
        return self.weights + self.kv + self.rows + self.runtime


def rows_gib(config: ModelConfig) -> float:
    """Rows in, rows out, and between the matrices, of the largest batch."""
    return BATCH_ROWS * (2 * config.hidden_size + config.intermediate_size) * 2 / GIB


def expert_room(config: ModelConfig, dtype: str, device: Device) -> int:
    """(expert, layer) pairs that a device has memory for."""
    one = expert_bytes(config, dtype) / GIB
    # A CPU packs weights as it reads them: two matrices of one expert are there twice.
    reading = 2 / 3 * one if device.kind == "cpu" else 0.0
    return max(0, math.floor((FULL * device.memory - rows_gib(config) - CONTEXT_GIB[device.kind] - reading) / one))


def expert_memory(config: ModelConfig, dtype: str, device: Device, num_pairs: int) -> Memory:
    """Of a worker that holds so many pairs."""
    weights = num_pairs * expert_bytes(config, dtype) / GIB
    return Memory(weights, 0.0, rows_gib(config), CONTEXT_GIB[device.kind], device.memory)


def attention_weights_gib(config: ModelConfig, dtype: str) -> float:
    """Projections of all layers, the embedding, and the head, which is laid out once more."""
    params = config.num_layers * projection_params(config) + 2 * head_params(config)
    return params * weight_bytes(dtype) / GIB


def attention_memory(config: ModelConfig, dtype: str, device: Device, kv_gib: float | None = None) -> Memory:
    """Of a worker whose KV pages take what is left, or what is asked for. Raises ConfigError when that is too much."""
    weights = attention_weights_gib(config, dtype)
    runtime = CONTEXT_GIB[device.kind] + ACTIVATIONS_GIB
    left = FULL * device.memory - weights - runtime
    kv = max(left, 0.0) if kv_gib is None else kv_gib
    sequence = config.context_length * kv_bytes(config, dtype) / GIB
    if kv > left or kv < sequence:
        raise ConfigError(
            f"attention on {device.name}: {weights:.1f} GiB of weights and {runtime:.1f} GiB beside them leave "
            f"{left:.1f} of {device.memory:.1f} GiB for KV pages; {max(kv, sequence):.1f} are wanted, and a sequence "
            f"of {config.context_length} positions needs {sequence:.1f}"
        )
    return Memory(weights, kv, 0.0, runtime, device.memory)
