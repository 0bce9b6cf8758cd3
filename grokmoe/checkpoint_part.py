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


def attention(layers: Callable[[ModelConfig], range]) -> Part:
    """What an attention worker reads: all but gates and experts, of its layers in a row and of the ends it has."""

    def part(config: ModelConfig) -> Needs:
        held = layers(config)
        ends = {names.embed()} if held.start == 0 else set()
        if held.stop == config.num_layers:
            ends |= {names.final_norm(), names.head(config)}

        def needs(name: str) -> bool:
            of_layer = names.layer_of(name) in held and not names.is_gate(name) and names.expert_of(name) is None
            return of_layer or name in ends

        return needs

    return part


def all_layers(config: ModelConfig) -> range:
    """The layers of a worker that has them all."""
    return range(config.num_layers)


def experts(cells: Callable[[ModelConfig], Collection[tuple[int, int]]]) -> Part:
    """What a worker reads that holds some experts. cells: (layer, expert) of each."""

    def part(config: ModelConfig) -> Needs:
        held = cells(config)
        return lambda name: (names.layer_of(name), names.expert_of(name)) in held

    return part
