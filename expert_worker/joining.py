"""Several calls for one layer -> one grouped GEMM, and its result back to each. Values in, values out.

Shapes: N rows, D hidden.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import torch


@dataclasses.dataclass(frozen=True, eq=False)
class RowsByExpert:
    """Rows sorted by expert. expert_ids strictly ascending; counts: rows of each, zero allowed."""

    expert_ids: Sequence[int]
    counts: Sequence[int]
    rows_ND: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Joined:
    """What `join` made of several calls; only `split` reads `owners`.

    owners: for each run of rows that came from one call, in order: the call's number and the run's length.
    """

    rows: RowsByExpert
    num_calls: int
    owners: tuple[tuple[int, int], ...]

    def split(self, out_ND: torch.Tensor) -> list[torch.Tensor]:
        """The output rows of each call, in the order of its input rows. One call gets out_ND itself."""
        if self.num_calls == 1:
            return [out_ND]
        parts: list[list[torch.Tensor]] = [[out_ND[:0]] for _ in range(self.num_calls)]
        begin = 0
        for call, length in self.owners:
            parts[call].append(out_ND[begin : begin + length])
            begin += length
        return [torch.cat(runs_ND) for runs_ND in parts]


def join(calls: Sequence[RowsByExpert]) -> Joined:
    """Merges calls of the same layer. One call passes through as it is; several cost one copy of their rows."""
    if len(calls) == 1:
        return Joined(calls[0], 1, ())
    runs: defaultdict[int, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for number, call in enumerate(calls):
        begin = 0
        for expert, count in zip(call.expert_ids, call.counts, strict=True):
            if count:
                runs[expert].append((number, call.rows_ND[begin : begin + count]))
            begin += count
    expert_ids = sorted(runs)
    counts = [sum(len(run_ND) for _, run_ND in runs[expert]) for expert in expert_ids]
    ordered = [run for expert in expert_ids for run in runs[expert]]
    rows_ND = torch.cat([run_ND for _, run_ND in ordered]) if ordered else calls[0].rows_ND
    owners = tuple((number, len(run_ND)) for number, run_ND in ordered)
    return Joined(RowsByExpert(expert_ids, counts, rows_ND), len(calls), owners)
