"""What one step of a model must read, multiply and send, whatever the program: pure arithmetic on the model's sizes.

Letters: T tokens of the step, R rows of logits, P positions attended to, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from grokmoe.model_config import ModelConfig

FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Work:
    """num_bytes: read or written. flops: in products. working_set: bytes that are gone over before these come again.
    num_hops: messages to other processes and back, one after another, of `hop_bytes` each way.
    """

    num_bytes: float = 0.0
    flops: float = 0.0
    working_set: float = 0.0
    num_hops: int = 0
    hop_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class StepShape:
    """A step. chunks: of each sequence, positions in the cache already and tokens to compute. itemsize: bytes of an
    element. num_workers: expert workers in other processes; 0: all in one process.
    """

    config: ModelConfig
    chunks: Sequence[tuple[int, int]]
    itemsize: int = 2
    num_workers: int = 0

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(length for _, length in self.chunks)

    @property
    def num_attended(self) -> int:
        """Query and key pairs of one head and layer."""
        return sum(start * length + length * (length + 1) // 2 for start, length in self.chunks)

    @property
    def num_cached(self) -> int:
        """Positions whose keys and values are read or written in one layer."""
        return sum(start + length for start, length in self.chunks)

    @property
    def num_touched(self) -> float:
        """Experts of a layer that get a row, on average, if all are as likely."""
        config = self.config
        return config.num_experts * (1 - (1 - config.experts_per_token / config.num_experts) ** self.num_tokens)


def matrix_elements(config: ModelConfig) -> int:
    """Elements of all matrices but the embedding's rows, which are looked up one by one."""
    return (
        config.num_layers * (_qkv(config) + _out(config) + config.num_experts * _expert(config))
        + config.vocab_size * config.hidden_size
    )


def work_of(shape: StepShape) -> dict[str, Work]:
    """By leg, in the order in which a step does them. Legs that no arithmetic bounds, such as the schedule, are left
    out."""
    config, size = shape.config, shape.itemsize
    T, R, L, D = shape.num_tokens, len(shape.chunks), config.num_layers, config.hidden_size
    K, rows_bytes = config.experts_per_token, T * D * size
    weights = matrix_elements(config) * size
    activations = T * D * (FLOAT32 + size)

    def product(elements: float, rows: int) -> Work:
        return Work(elements * size, 2 * elements * rows, weights)

    def touch(num_bytes: float) -> Work:
        return Work(num_bytes, 0.0, activations)

    kv_bytes = 2 * shape.num_cached * config.kv_size * size
    scores = 4 * shape.num_attended * config.num_heads * config.head_dim
    experts = shape.num_touched * _expert(config)
    # Of the residual and of what is added to it: each norm reads one, each addition reads both and writes one.
    norm_bytes = L * T * D * (2 * (FLOAT32 + size) + 2 * (2 * FLOAT32 + size))
    work = {
        "embed": Work(rows_bytes + T * D * FLOAT32, 0.0, config.vocab_size * D * size),
        "norm": touch(norm_bytes),
        "qkv": product(L * _qkv(config), T),
        "attention": Work(L * kv_bytes, L * scores, L * kv_bytes),
        "out": product(L * _out(config), T),
        "gate": touch(L * (rows_bytes + config.num_experts * D * FLOAT32)),
        "dispatch": touch(L * (1 + K) * rows_bytes),
        "expert": Work(L * experts * size, 2 * L * T * K * _expert(config), weights),
        "combine": touch(L * (1 + K) * rows_bytes),
        "head": product(config.vocab_size * D, R),
        "sample": touch(R * config.vocab_size * FLOAT32),
    }
    if shape.num_workers:
        work["attention_wire"] = Work(num_hops=L, hop_bytes=rows_bytes)
        work["wire"] = Work(num_hops=L, hop_bytes=K * rows_bytes / shape.num_workers)
    return work


def _qkv(config: ModelConfig) -> int:
    return config.hidden_size * (config.query_size + 2 * config.kv_size)


def _out(config: ModelConfig) -> int:
    return config.query_size * config.hidden_size


def _expert(config: ModelConfig) -> int:
    return 3 * config.hidden_size * config.intermediate_size
