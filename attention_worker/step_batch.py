"""One step of the attention worker: chunks of tokens from many sequences, as tensors that all layers share.

Shapes: T tokens of the step, C chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from attention_worker.kernels.tiles import Spans, TileGroup, TileShape, plan_tiles
from grokmoe.step_plan import SequenceChunk

T = TypeVar("T")


@dataclass(frozen=True)
class RowsApart:
    """Rows that a kernel computes one by one, int64 each.

    rows_R: which. Row t sees the first num_keys_T[t] slots of the pages from pages[offsets_T[t]] on.
    num_keys: of all these rows together.
    """

    rows_R: torch.Tensor
    pages: torch.Tensor
    offsets_T: torch.Tensor
    num_keys_T: torch.Tensor
    num_keys: int


@dataclass(frozen=True)
class StepBatch:
    """The step's tensors, built once on the CPU; `to` has them on a device. Its rows are the chunks' tokens, one chunk
    after the other.

    token_ids_T, positions_T, slots_T  int64; slot = page * page_size + offset is where the token's K and V go
    chunks                             what the batch was built from
    """

    chunks: tuple[SequenceChunk, ...]
    page_size: int
    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    spans: Spans
    _groups: dict[tuple[TileShape, int], tuple[TileGroup, ...]] = field(default_factory=dict, repr=False, compare=False)
    _apart: dict[int | None, RowsApart] = field(default_factory=dict, repr=False, compare=False)
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def build(cls, chunks: Sequence[SequenceChunk], page_size: int) -> StepBatch:
        """The batch of `chunks`, in their order; sequences may share pages that hold a common prefix.

        ValueError for a chunk with no tokens, a negative start or page id, or fewer pages than its positions need.
        Whether a page exists in the cache is not known here.
        """
        if page_size < 1:
            raise ValueError(f"page size {page_size} is not positive")
        for index, chunk in enumerate(chunks):
            _check(index, chunk, page_size)
        length_C = np.array([len(chunk.token_ids) for chunk in chunks], np.int64)
        start_C = np.array([chunk.start for chunk in chunks], np.int64)
        num_pages_C = np.array([len(chunk.page_ids) for chunk in chunks], np.int64)
        first_row_C, page_offset_C = np.cumsum(length_C) - length_C, np.cumsum(num_pages_C) - num_pages_C
        pages = _concatenate([chunk.page_ids for chunk in chunks])
        if pages.size and pages.min() < 0:
            raise ValueError(f"negative page id {pages.min()}")
        position_T = np.arange(length_C.sum()) + np.repeat(start_C - first_row_C, length_C)
        page_T = pages[np.repeat(page_offset_C, length_C) + position_T // page_size]
        return cls(
            chunks=tuple(chunks),
            page_size=page_size,
            token_ids_T=torch.from_numpy(_concatenate([chunk.token_ids for chunk in chunks])),
            positions_T=torch.from_numpy(position_T),
            slots_T=torch.from_numpy(page_T * page_size + position_T % page_size),
            spans=Spans(first_row_C, length_C, start_C, page_offset_C, pages, len(position_T)),
        )

    def to(self, device: torch.device) -> StepBatch:
        """The batch with its tensors on a device; what they were built from stays where it is."""
        if device.type == "cpu":
            return self
        tensors = (self.token_ids_T, self.positions_T, self.slots_T)
        token_ids_T, positions_T, slots_T = to_device(torch.stack(tensors), device)
        return replace(self, token_ids_T=token_ids_T, positions_T=positions_T, slots_T=slots_T)

    @functools.cached_property
    def embeds(self) -> list[tuple[int, torch.Tensor]]:
        """Rows in place of those of the embedding table: the first of the step's, and what is there."""
        firsts = self.spans.first_row_C.tolist()
        return [(row, chunk.embeds) for row, chunk in zip(firsts, self.chunks, strict=True) if chunk.embeds is not None]

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """What a kernel makes of the batch at the step's first layer and uses at the others."""
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found

    def check_pages(self, num_pages: int) -> None:
        """IndexError if a page is not in a cache of so many."""
        if self._last_page >= num_pages:
            raise IndexError(f"page {self._last_page} of a cache of {num_pages} pages")

    @functools.cached_property
    def _last_page(self) -> int:
        """Asked for in every layer; found once."""
        return int(self.spans.pages.max(initial=-1))

    def rows_apart(self, most_tokens: int | None) -> RowsApart:
        """The rows of chunks of at most so many tokens, of all chunks for None. Found once."""
        apart = self._apart.get(most_tokens)
        if apart is None:
            apart = self._apart[most_tokens] = self._find_apart(most_tokens)
        return apart

    def _find_apart(self, most_tokens: int | None) -> RowsApart:
        spans = self.spans
        rows = np.arange(spans.num_rows)
        if most_tokens is not None:
            rows = rows[np.repeat(spans.length_C <= most_tokens, spans.length_C)]
        offsets_T = torch.from_numpy(np.repeat(spans.page_offset_C, spans.length_C))
        num_keys_T = self.positions_T + 1
        num_keys = int(num_keys_T.numpy()[rows].sum())
        return RowsApart(torch.from_numpy(rows), torch.from_numpy(spans.pages), offsets_T, num_keys_T, num_keys)

    def tile_groups(self, shape: TileShape, more_than: int = 0) -> tuple[TileGroup, ...]:
        """The tiling of the chunks of more tokens than that, planned at the step's first layer and kept for the
        others."""
        key = shape, more_than
        groups = self._groups.get(key)
        if groups is None:
            groups = self._groups[key] = plan_tiles(self.spans.select(self.spans.length_C > more_than), shape)
        return groups


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy there. To a GPU from pinned memory, so that it does not wait for the kernels queued before it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _check(index: int, chunk: SequenceChunk, page_size: int) -> None:
    if not chunk.token_ids or chunk.start < 0:
        raise ValueError(f"chunk {index}: {len(chunk.token_ids)} tokens from position {chunk.start}")
    end = chunk.start + len(chunk.token_ids)
    if len(chunk.page_ids) * page_size < end:
        raise ValueError(f"chunk {index}: {len(chunk.page_ids)} pages of {page_size} hold no {end} positions")


def _concatenate(lists: Sequence[Sequence[int]]) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.int64) for x in lists]) if lists else np.empty(0, np.int64)
