"""What the adapters of a step's chunks come to: which rows are corrected by which, and which tokens are added ones.

Letters: T tokens of the step, R rows of logits, S adapters of the step, N rows of one adapter, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from attention_worker.kernels.low_rank import Segments
from attention_worker.lora.adapter import Adapter
from grokmoe.linear import Linear
from grokmoe.step_plan import SequenceChunk


@dataclass(frozen=True)
class ReadRows:
    """rows_N: rows of the step that are added tokens. ids_N: which, as rows of `rows_XD`."""

    rows_XD: torch.Tensor
    rows_N: torch.Tensor
    ids_N: torch.Tensor


@dataclass(frozen=True)
class DrawnRows:
    """rows_N: rows of logits for which added tokens can be drawn. head: to the logits of these."""

    head: Linear
    rows_N: torch.Tensor


@dataclass(frozen=True)
class StepAdapters:
    """segments: for the projections. read, drawn: of each adapter with added tokens. vocab_sizes_C: of each chunk, the
    model's and what its adapter adds."""

    segments: Segments
    read: tuple[ReadRows, ...]
    drawn: tuple[DrawnRows, ...]
    vocab_sizes_C: tuple[int, ...]

    @property
    def adds_tokens(self) -> bool:
        """Whether the chunks' vocabularies differ, or are not the model's."""
        return len(set(self.vocab_sizes_C)) > 1 or bool(self.drawn)


def step_adapters(
    chunks: Sequence[SequenceChunk], adapters_C: Sequence[Adapter | None], step_rows_R: Sequence[int], vocab_size: int
) -> StepAdapters | None:
    """adapters_C: of each chunk. step_rows_R: the rows of the step whose logits are wanted, ascending.

    Returns None when no chunk has an adapter.
    """
    rows_of: dict[str, list[int]] = {}
    by_id: dict[str, Adapter] = {}
    begin = 0
    for chunk, adapter in zip(chunks, adapters_C, strict=True):
        end = begin + len(chunk.token_ids)
        if adapter is not None:
            rows_of.setdefault(adapter.info.id, []).extend(range(begin, end))
            by_id[adapter.info.id] = adapter
        begin = end
    if not by_id:
        return None
    segments = Segments(
        rows_N=np.array([row for rows in rows_of.values() for row in rows], np.int64),
        counts_S=tuple(len(rows) for rows in rows_of.values()),
        parts=tuple(by_id[adapter_id].parts for adapter_id in rows_of),
        table_LSPW=np.stack([by_id[adapter_id].table_LPW for adapter_id in rows_of], axis=1),
    )
    read, drawn = [], []
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    for adapter_id, rows in rows_of.items():
        added = by_id[adapter_id].added
        if added is None:
            continue
        new = [row for row in rows if tokens[row] >= vocab_size]
        if new and added.embedding_XD is not None:
            ids = [tokens[row] - vocab_size for row in new]
            read.append(ReadRows(added.embedding_XD, torch.tensor(new), torch.tensor(ids)))
        own = set(rows)
        drawing = [place for place, row in enumerate(step_rows_R) if row in own]
        if drawing and added.head is not None:
            drawn.append(DrawnRows(added.head, torch.tensor(drawing)))
    sizes = [vocab_size + (adapter.info.num_added_tokens if adapter else 0) for adapter in adapters_C]
    return StepAdapters(segments, tuple(read), tuple(drawn), tuple(sizes))
