"""One matrix of an expert on its way from a checkpoint to the layout of a kernel, in pieces: it need not be in memory
as a whole.

Letters: O outputs, I inputs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch

FP8 = torch.float8_e4m3fn


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a matrix from `begin` on. scale_O: float32, of rows in float8_e4m3fn; None of any other."""

    begin: int
    rows_OI: torch.Tensor
    scale_O: torch.Tensor | None = None

    @property
    def rows(self) -> slice:
        """Which."""
        return slice(self.begin, self.begin + len(self.rows_OI))


@dataclasses.dataclass(frozen=True)
class Matrix:
    """[out, in] as in the checkpoint. pieces: ascending, each row once; to be gone through once.

    dtype: of the pieces, float8_e4m3fn with scales where that is what is stored and wanted.
    """

    num_outputs: int
    num_inputs: int
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Piece]]

    @classmethod
    def of(cls, weight_OI: torch.Tensor) -> Matrix:
        """One that is in memory."""
        return cls(*weight_OI.shape, weight_OI.dtype, lambda: iter((Piece(0, weight_OI),)))

    def whole(self) -> torch.Tensor:
        """All of it, not to be written to. For types without scales."""
        pieces = self.pieces()
        first = next(pieces)
        if len(first.rows_OI) == self.num_outputs:
            return first.rows_OI
        weight_OI = torch.empty(self.num_outputs, self.num_inputs, dtype=self.dtype)
        for piece in itertools.chain((first,), pieces):
            assert piece.scale_O is None, "these pieces have scales"
            weight_OI[piece.rows] = piece.rows_OI
        return weight_OI

    def in_memory(self) -> Matrix:
        """The same, read."""
        if self.dtype is not FP8:
            return Matrix.of(self.whole())
        pieces = tuple(self.pieces())
        return dataclasses.replace(self, pieces=lambda: iter(pieces))
