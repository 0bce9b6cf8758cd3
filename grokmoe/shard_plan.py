"""Which tensor goes into which file of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from grokmoe import tensor_names as names
from grokmoe.model_config import ModelConfig

Plan = dict[str, list[str]]
"""File name -> its tensors in order. The files in the order of the forward pass, too."""


def by_size(sizes: Mapping[str, int], max_bytes: int) -> Plan:
    """Files of at most so many bytes; one tensor may exceed that. sizes: in bytes, by tensor."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": shard for number, shard in enumerate(shards, 1)}


def by_expert(config: ModelConfig) -> Plan:
    """A file for every expert of every layer, so that a worker needs no more than the files of its own.

    Of the others, one for all gates, one for each layer's attention and norms, one for the embedding, one for the end.
    """
    plan: Plan = {}
    layer_digits, expert_digits = len(str(config.num_layers - 1)), len(str(config.num_experts - 1))
    for spec in names.expected(config):
        layer, expert = names.layer_of(spec.name), names.expert_of(spec.name)
        if names.is_gate(spec.name):
            what = "gates"
        elif layer is not None:
            what = f"layer-{layer:0{layer_digits}}" + ("" if expert is None else f"-expert-{expert:0{expert_digits}}")
        else:
            what = "embedding" if spec.part == "embedding" else "end"
        plan.setdefault(f"model-{what}.safetensors", []).append(spec.name)
    return plan
