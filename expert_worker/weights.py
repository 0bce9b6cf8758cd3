"""Reads a worker's experts from a checkpoint: nothing else of it is touched, and one tensor at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from expert_worker.cells import by_layer
from expert_worker.experts import ExpertSet
from expert_worker.layers import LayerWeights
from grokmoe import tensor_names
from grokmoe.checkpoint import Checkpoint
from grokmoe.errors import Cancelled

logger = logging.getLogger(__name__)

SLICE_BYTES = 1 << 20
"""A checkpoint copies what it reads while it has the interpreter's lock, and a worker that loads beside its work has
calls to answer meanwhile: that much takes a fraction of a millisecond."""

Put = Callable[[LayerWeights, int, tensor_names.ExpertLinear, torch.Tensor], None]


def put_here(weights: LayerWeights, expert: int, linear: tensor_names.ExpertLinear, weight: torch.Tensor) -> None:
    """Lays a matrix out on the thread that has read it."""
    weights.put(expert, linear, weight)


def load(experts: ExpertSet, checkpoint: Checkpoint, is_stopping: Callable[[], bool] = lambda: False) -> None:
    """Fills `experts` with what its holdings say. Beyond what it keeps the host holds one tensor in the wanted type.

    is_stopping: asked between slices. Raises Cancelled when it says so, CheckpointError for a damaged file.
    """
    began = time.monotonic()
    held = by_layer(experts.holdings.held)
    for layer, expert_ids in held.items():
        load_layer(experts, checkpoint, layer, expert_ids, is_stopping)
    num_experts = len(experts.holdings.held)
    logger.info("loaded %d experts in %d layers in %.1f s", num_experts, len(held), time.monotonic() - began)


def load_layer(
    experts: ExpertSet,
    checkpoint: Checkpoint,
    layer: int,
    expert_ids: Sequence[int],
    is_stopping: Callable[[], bool] = lambda: False,
    put: Put = put_here,
) -> None:
    """Adds experts to one layer; those that it has keep what they have. Either all of them are there then or none.

    put: who lays out a matrix. Raises as `load` does, and what torch raises when there is no memory.
    """
    old = experts.layers[layer]
    missing = [expert for expert in expert_ids if not old.holds(expert)]
    weights = old.resized(sorted({*old.expert_ids, *missing}))
    for expert in missing:
        for linear in tensor_names.EXPERT_LINEARS:
            name = tensor_names.expert(layer, expert, linear)
            put(weights, expert, linear, _read(checkpoint, name, experts.dtype, is_stopping))
    experts.replace(layer, weights)


def _read(checkpoint: Checkpoint, name: str, dtype: torch.dtype, is_stopping: Callable[[], bool]) -> torch.Tensor:
    """One matrix, in slices of its rows. Mapped no longer than it is copied, so none of its pages stay with us."""
    num_rows, num_columns = checkpoint.tensors[name].shape
    step = max(1, SLICE_BYTES // (num_columns * dtype.itemsize))
    weight = torch.empty(num_rows, num_columns, dtype=dtype)
    for begin in range(0, num_rows, step):
        if is_stopping():
            raise Cancelled("stopped while loading")
        rows = slice(begin, min(begin + step, num_rows))
        weight[rows].copy_(checkpoint.read(name, dtype, rows))
    return weight
