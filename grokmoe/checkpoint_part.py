"""Which tensors of a checkpoint somebody needs: the others may be missing on their disk."""

from __future__ import annotations

from collections.abc import Callable, Collection

from grokmoe import tensor_names as names
from grokmoe.model_config import ModelConfig

Needs = Callable[[str], bool]
"""Whether a tensor is needed, by its canonical name."""

Part = Callable[[ModelConfig], Needs]
"""What is needed of a model."""


def whole(config: ModelConfig) -> Needs:
    """Everything."""
    return lambda name: True


def router(config: ModelConfig) -> Needs:
    """What a router reads: the gates."""
    return names.is_gate


def attention(config: ModelConfig) -> Needs:
    """What an attention worker reads: all but gates and experts."""
    return lambda name: not names.is_gate(name) and names.expert_of(name) is None


def experts(cells: Callable[[ModelConfig], Collection[tuple[int, int]]]) -> Part:
    """What a worker reads that holds some experts. cells: (layer, expert) of each."""

    def part(config: ModelConfig) -> Needs:
        held = cells(config)
        return lambda name: (names.layer_of(name), names.expert_of(name)) in held

    return part
