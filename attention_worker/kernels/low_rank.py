"""Corrections of low rank, by row: which rows of a step have which adapter, ready for the kernels that add them.

Rows that have the same adapter are a segment. Kernels find a segment's weights by their addresses, so that adapters of
any rank and number are computed together and nothing is copied when one is loaded.

Letters: N rows that have an adapter, S segments, L layers, P = 4 projections (q, k, v, o), W words of an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

T = TypeVar("T")

Ints = NDArray[np.int64]


class Projections(NamedTuple):
    """Which of the four projections one product computes."""

    begin: int
    end: int


QKV, OUT = Projections(0, 3), Projections(3, 4)

RANK, FIRST_OUT, NUM_OUT, SCALE = 2, 3, 4, 5
"""Words of an entry behind the addresses of A and B: rank, where its outputs begin, how many, the scale's bits."""


class LowRank(Protocol):
    """One projection's correction, see attention_worker.lora.adapter."""

    a_RI: torch.Tensor
    b_RO: torch.Tensor
    scale: float
    first_out: int


@dataclass(frozen=True)
class Segments:
    """rows_N: rows of the step, one segment after the other. counts_S: rows of each segment.

    parts: per segment, layer and projection, for plain torch. table_LSPW: the same for kernels.
    """

    rows_N: Ints
    counts_S: tuple[int, ...]
    parts: tuple[Sequence[Sequence[LowRank | None]], ...]
    table_LSPW: Ints
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """What a kernel makes of the segments at the step's first layer and uses at the others."""
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found

    def blocks(self, most_rows: int) -> Ints:
        """[blocks, 3]: first place in rows_N, rows, segment. No block has more rows than that, or of two
        segments."""
        found, first = [], 0
        for segment, count in enumerate(self.counts_S):
            for begin in range(0, count, most_rows):
                found.append((first + begin, min(most_rows, count - begin), segment))
            first += count
        return np.array(found, np.int64).reshape(-1, 3)
