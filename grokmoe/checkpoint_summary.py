"""What a checkpoint holds, by part: the data of `grokmoe checkpoint inspect`."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable

from grokmoe import tensor_names as names
from grokmoe.checkpoint import Checkpoint
from grokmoe.layouts import Source


@dataclasses.dataclass(frozen=True)
class Size:
    """How much some tensors are together. bytes: as stored."""

    tensors: int
    parameters: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class CheckpointSummary:
    """Sizes and identity of a checkpoint.

    parts: "embedding", "attention", "gate", "experts", "norms" and, untied, "head" -> size over all layers.
    experts: expert id -> size over all layers.
    dtypes: stored type -> number of parameters in it.
    files: file name -> bytes on disk. layout: its name, for people.
    """

    total: Size
    parts: dict[str, Size]
    experts: dict[int, Size]
    dtypes: dict[str, int]
    files: dict[str, int]
    layout: str
    num_layers: int
    tied: bool
    config_hash: str


def summary(checkpoint: Checkpoint) -> CheckpointSummary:
    """Sums up an open checkpoint from its headers; reads no tensor."""
    by_part: dict[str, list[Source]] = {}
    by_expert: dict[int, list[Source]] = {}
    dtypes: Counter[str] = Counter()
    for spec in names.expected(checkpoint.config):
        tensor = checkpoint.tensors[spec.name]
        by_part.setdefault(spec.part, []).append(tensor)
        dtypes[tensor.dtype] += math.prod(tensor.shape)
        expert_id = names.expert_of(spec.name)
        if expert_id is not None:
            by_expert.setdefault(expert_id, []).append(tensor)
    return CheckpointSummary(
        total=_size(checkpoint.tensors.values()),
        parts={part: _size(tensors) for part, tensors in by_part.items()},
        experts={expert_id: _size(tensors) for expert_id, tensors in by_expert.items()},
        dtypes=dict(dtypes),
        files={path.name: path.stat().st_size for path in checkpoint.files},
        layout=checkpoint.layout,
        num_layers=checkpoint.config.num_layers,
        tied=checkpoint.config.tie_word_embeddings,
        config_hash=checkpoint.config.content_hash,
    )


def _size(tensors: Iterable[Source]) -> Size:
    listed = list(tensors)
    return Size(
        tensors=len(listed),
        parameters=sum(math.prod(tensor.shape) for tensor in listed),
        bytes=sum(tensor.num_bytes for tensor in listed),
    )
