"""What a model asks for where its parts must become a whole, and the answer of a worker of one rank.

Shapes: T tokens, D hidden, V rows of the vocabulary held, R rows of logits.
"""

from __future__ import annotations

from typing import Protocol

import torch

from attention_worker.row_passes import rows_of


class Sharding(Protocol):
    """Three places of a forward where ranks depend on each other. All ranks come to them in the same order."""

    def embed(self, table_VD: torch.Tensor, token_ids_T: torch.Tensor, factor: float) -> torch.Tensor:
        """factor times the tokens' rows of the embedding, float32 [T, D], on every rank. table_VD: this rank's rows."""

    def sum(self, part_TD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The sum of all ranks' parts in `dtype`, the same bits on every rank."""

    def join(self, part_RV: torch.Tensor) -> torch.Tensor:
        """The logits of the whole vocabulary, on rank 0. What other ranks get is for nobody."""


class Whole:
    """A worker of one rank: every part is all there is."""

    def embed(self, table_VD: torch.Tensor, token_ids_T: torch.Tensor, factor: float) -> torch.Tensor:
        """See Sharding."""
        return rows_of(table_VD, token_ids_T, factor)

    def sum(self, part_TD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See Sharding. The part has the type already."""
        return part_TD

    def join(self, part_RV: torch.Tensor) -> torch.Tensor:
        """See Sharding."""
        return part_RV


WHOLE = Whole()
