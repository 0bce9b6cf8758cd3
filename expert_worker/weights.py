"""Reads a worker's experts from a checkpoint: nothing else of it is touched, and one tensor at a time.

Of an expert that is cut, only the worker's slice is read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from expert_worker.cells import by_layer
from expert_worker.experts import ExpertSet
from expert_worker.layers import Layer
from grokmoe import tensor_names
from grokmoe.checkpoint import Checkpoint
from grokmoe.errors import Cancelled
from grokmoe.expert_ranges import size_of
from grokmoe.expert_units import slice_of

logger = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20
"""A checkpoint copies what it reads while it has the interpreter's lock, and a worker that loads beside its work has
calls to answer meanwhile: that much takes a fraction of a millisecond."""

Put = Callable[[Layer, int, tensor_names.ExpertLinear, torch.Tensor], None]


def put_here(weights: Layer, expert: int, linear: tensor_names.ExpertLinear, weight: torch.Tensor) -> None:
    """Lays a matrix out on the thread that has read it."""
    weights.put(expert, linear, weight)


def load(experts: ExpertSet, checkpoint: Checkpoint, is_stopping: Callable[[], bool] = lambda: False) -> None:
    """Fills `experts` with what its holdings say. Beyond what it keeps the host holds one tensor in the wanted type.

    is_stopping: asked between pieces. Raises Cancelled when it says so, CheckpointError for a damaged file.
    """
    began = time.monotonic()
    held = by_layer(experts.holdings.held)
    for layer, expert_ids in held.items():
        load_layer(experts, checkpoint, layer, expert_ids, is_stopping)
    num_experts = size_of(experts.holdings.held)
    logger.info("loaded %s experts in %d layers in %.1f s", num_experts, len(held), time.monotonic() - began)


def load_layer(
    experts: ExpertSet,
    checkpoint: Checkpoint,
    layer: int,
    expert_ids: Sequence[int],
    is_stopping: Callable[[], bool] = lambda: False,
    put: Put = put_here,
) -> None:
    """Adds units to one layer; those that it has keep what they have. Either all of them are there then or none.

    put: who lays out a matrix. Raises as `load` does, and what torch raises when there is no memory.
    """
    old = experts.layers[layer]
    missing = [expert for expert in expert_ids if not old.holds(expert)]
    weights = experts.resized(layer, sorted({*old.expert_ids, *missing}))
    for unit in missing:
        expert, index, num_slices = slice_of(unit)
        for linear in tensor_names.EXPERT_LINEARS:
            name = tensor_names.expert(layer, expert, linear)
            rows, columns = (slice(0, size) for size in checkpoint.source(name).shape)
            if linear == "linear_1":
                columns = _part(columns.stop, index, num_slices)
            else:
                rows = _part(rows.stop, index, num_slices)
            put(weights, unit, linear, _read(checkpoint, name, experts.dtype, rows, columns, is_stopping))
    experts.replace(layer, weights)


def _part(size: int, index: int, num_slices: int) -> slice:
    return slice(size * index // num_slices, size * (index + 1) // num_slices)


def _read(
    checkpoint: Checkpoint,
    name: str,
    dtype: torch.dtype,
    rows: slice,
    columns: slice,
    is_stopping: Callable[[], bool],
) -> torch.Tensor:
    """A part of one matrix, piece by piece. Mapped no longer than it is copied, so none of its pages stay with us."""
    weight = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=dtype)
    for place, piece in checkpoint.pieces(name, PIECE_BYTES, dtype, rows, columns):
        if is_stopping():
            raise Cancelled("stopped while loading")
        weight[place] = piece
    return weight
