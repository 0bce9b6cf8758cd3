"""Reads a worker's experts from a checkpoint: nothing else of it is touched, and one matrix at a time.

Of an expert that is cut, only the worker's slice is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from expert_worker.cells import by_layer
from expert_worker.experts import ExpertSet
from expert_worker.layer import Layer
from expert_worker.matrix import FP8, Matrix, Piece
from grokmoe import tensor_names
from grokmoe.checkpoint import Checkpoint
from grokmoe.errors import Cancelled
from grokmoe.expert_ranges import size_of
from grokmoe.expert_units import slice_of
from grokmoe.progress import Progress

logger = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20
"""A checkpoint copies what it reads while it has the interpreter's lock, and a worker that loads beside its work has
calls to answer meanwhile: that much takes a fraction of a millisecond."""

Put = Callable[[Layer, int, tensor_names.ExpertLinear, Matrix], None]


def put_here(weights: Layer, expert: int, linear: tensor_names.ExpertLinear, matrix: Matrix) -> None:
    """Reads a matrix and lays it out, on this thread."""
    weights.fill(expert, linear, matrix)


def load(
    experts: ExpertSet,
    checkpoint: Checkpoint,
    is_stopping: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = logger.info,
) -> None:
    """Fills `experts` with what its holdings say. Beyond what it keeps the host holds one matrix in the wanted type, or
    a piece of one where the layout is that of the checkpoint.

    is_stopping: asked between pieces. say: takes a line of progress now and then. Raises Cancelled when the former says
    so, CheckpointError for a damaged file.
    """
    held = by_layer(experts.holdings.held)
    matrices = _matrices(checkpoint, held)
    progress = Progress("experts", sum(part.num_bytes for part in matrices), say)
    for layer, expert_ids in held.items():
        load_layer(experts, checkpoint, layer, expert_ids, is_stopping, progress=progress)
    say(f"read {size_of(experts.holdings.held)} experts in {len(held)} layers: {progress.end()}")


def load_layer(
    experts: ExpertSet,
    checkpoint: Checkpoint,
    layer: int,
    expert_ids: Sequence[int],
    is_stopping: Callable[[], bool] = lambda: False,
    put: Put = put_here,
    progress: Progress | None = None,
) -> None:
    """Adds units to one layer; those that it has keep what they have. Either all of them are there then or none.

    put: who lays out a matrix. Raises as `load` does, and what torch raises when there is no memory.
    """
    old = experts.layers[layer]
    missing = [expert for expert in expert_ids if not old.holds(expert)]
    weights = experts.resized(layer, sorted({*old.expert_ids, *missing}))
    for part in _matrices(checkpoint, {layer: missing}):
        dtype = FP8 if weights.takes_fp8 and checkpoint.is_in_8_bits(part.name) else experts.dtype
        put(weights, part.unit, part.linear, _matrix(checkpoint, part, dtype, is_stopping, progress))
    experts.replace(layer, weights)


class _Part(NamedTuple):
    """A matrix of a unit in the checkpoint: its name there, and what of it is read."""

    unit: int
    linear: tensor_names.ExpertLinear
    name: str
    rows: slice
    columns: slice
    num_bytes: int


def _matrices(checkpoint: Checkpoint, units: Mapping[int, Sequence[int]]) -> list[_Part]:
    """units: by layer."""
    parts = []
    for layer, unit in ((layer, unit) for layer, units_here in units.items() for unit in units_here):
        expert, index, num_slices = slice_of(unit)
        for linear in tensor_names.EXPERT_LINEARS:
            name = tensor_names.expert(layer, expert, linear)
            source = checkpoint.source(name)
            rows, columns = (slice(0, size) for size in source.shape)
            if linear == "linear_1":
                columns = _part(columns.stop, index, num_slices)
            else:
                rows = _part(rows.stop, index, num_slices)
            parts.append(_Part(unit, linear, name, rows, columns, source.num_bytes // num_slices))
    return parts


def _part(size: int, index: int, num_slices: int) -> slice:
    return slice(size * index // num_slices, size * (index + 1) // num_slices)


def _matrix(
    checkpoint: Checkpoint,
    part: _Part,
    dtype: torch.dtype,
    is_stopping: Callable[[], bool],
    progress: Progress | None,
) -> Matrix:
    """A matrix in that type. Mapped no longer than it is copied, so none of its pages stay with us."""
    rows, columns = part.rows, part.columns
    num_outputs, num_inputs = rows.stop - rows.start, columns.stop - columns.start

    def pieces() -> Iterator[Piece]:
        if dtype is FP8:
            stored = checkpoint.pieces_in_8_bits(part.name, PIECE_BYTES, rows, columns)
        else:
            stored = ((*each, None) for each in checkpoint.pieces(part.name, PIECE_BYTES, dtype, rows, columns))
        for place, rows_OI, scale_O in stored:
            if is_stopping():
                raise Cancelled("stopped while loading")
            yield Piece(place.start, rows_OI, scale_O)
            if progress is not None:
                progress.add(part.num_bytes * len(rows_OI) // num_outputs)

    return Matrix(num_outputs, num_inputs, dtype, pieces)
