"""The tiling of one step's long chunks for the CPU kernel: which rows meet which pages in one batched product.

A tile is a run of query rows of one chunk with every key those rows may see. Tiles of the same row class and of
like key length form a group, and a group is one batch of matrix products over (tile, KV head) pairs. A group's
working set is bounded, so the number of groups grows with the work of the step, never with sequences * heads.

Shapes: N tiles of a group, R query rows of a tile (padded), L keys of a tile (padded, a whole number of pages),
J pages of a tile, S slots of a page, K KV heads, T tokens of
the step, C chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

MAX_TILE_ROWS = 64
"""Most query rows of a tile: more share one gather of the keys, but see more keys that the mask hides."""

MIN_TILE_ROWS = 16
"""Fewest rows that a long key range may cut a tile down to; below this the gather costs more than it saves."""

TILE_BYTES = 16 << 20
"""Scores of one tile, all heads, four bytes each in two parts: cut into fewer rows beyond this."""

GROUP_BYTES = 8 << 20
"""Gathered keys (the values take their place later) and scores of one group: more tiles join it only
below this. Small groups lose to the fixed cost of some twenty torch calls, large ones to cache misses."""

PADDING_SHARE = 0.15
"""Padding keys that tiles of unlike length may cause in a group, as a share of the group's work, and ..."""

PADDING_BYTES = 256 << 10
"""... beyond that share, in bytes: another group would cost as much as this much padding."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TileShape:
    """What the tiling must know of the heads and of the cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_pages: int
    page_size: int
    element_bytes: int


@dataclass(frozen=True)
class Spans:
    """Chunks of a step as arrays over chunks; `pages` holds every chunk's page ids, one after the other. num_rows: of
    the step, whose rows `first_row_C` counts."""

    first_row_C: Ints
    length_C: Ints
    start_C: Ints
    page_offset_C: Ints
    pages: Ints
    num_rows: int

    def select(self, chosen_C: NDArray[np.bool_]) -> Spans:
        """Some of the chunks."""
        return Spans(
            self.first_row_C[chosen_C],
            self.length_C[chosen_C],
            self.start_C[chosen_C],
            self.page_offset_C[chosen_C],
            self.pages,
            self.num_rows,
        )


@dataclass(frozen=True)
class TileGroup:
    """One batch of tiles. All indices are ready for use, so a layer does no planning.

    q_rows_NR    [N*R] rows of q to read (a padding row repeats its tile's last row)
    out_rows_NR  [N*R] rows of the output to write (a padding row goes to row T, which is dropped)
    first_row    set when the rows are one run without padding: a slice then replaces both indices
    pages_NKJ    [N*K*J] rows of the cache seen as [K * num_pages, S * d]; padding repeats the tile's first page
    num_seen_NKR [N*K*R] keys that a row may see, the first of L
    unused_slots rows of the gathered values, seen as [N*K*L, d], that hold no token of the tile; None for none
    """

    num_tiles: int
    num_rows: int
    num_keys: int
    q_rows_NR: torch.Tensor
    out_rows_NR: torch.Tensor
    first_row: int | None
    pages_NKJ: torch.Tensor
    num_seen_NKR: torch.Tensor
    unused_slots: torch.Tensor | None


@dataclass(frozen=True)
class _Tiles:
    """All tiles of a step as arrays over tiles: first row in the step, its position, number of rows, chunk."""

    row: Ints
    num_rows: Ints
    position: Ints
    chunk: Ints

    def __getitem__(self, index: Ints) -> _Tiles:
        return _Tiles(self.row[index], self.num_rows[index], self.position[index], self.chunk[index])

    @property
    def num_keys(self) -> Ints:
        return self.position + self.num_rows


def plan_tiles(spans: Spans, shape: TileShape) -> tuple[TileGroup, ...]:
    """Groups of tiles that cover every row of these chunks once. The cache must have their pages."""
    tiles = _cut(spans, shape)
    return tuple(_group(tiles[index], row_class, spans, shape) for row_class, index in _batches(tiles, shape))


def _power_of_two_at_least(x: Ints) -> Ints:
    return np.int64(1) << np.ceil(np.log2(x)).astype(np.int64)


def _cut(spans: Spans, shape: TileShape) -> _Tiles:
    """Cut every chunk into tiles of equal height, the last maybe lower; longer key ranges give lower tiles."""
    most_keys_C = spans.start_C + spans.length_C
    fitting_C = np.maximum(TILE_BYTES // (4 * shape.num_heads * most_keys_C), 1)
    height_C = np.clip(_power_of_two_at_least(fitting_C + 1) // 2, MIN_TILE_ROWS, MAX_TILE_ROWS)
    tiles_C = -(-spans.length_C // height_C)
    chunk = np.repeat(np.arange(len(tiles_C)), tiles_C)
    offset = (np.arange(len(chunk)) - np.repeat(np.cumsum(tiles_C) - tiles_C, tiles_C)) * height_C[chunk]
    return _Tiles(
        row=spans.first_row_C[chunk] + offset,
        num_rows=np.minimum(height_C[chunk], spans.length_C[chunk] - offset),
        position=spans.start_C[chunk] + offset,
        chunk=chunk,
    )


def _num_pages(tiles: _Tiles, shape: TileShape) -> Ints:
    return -(-tiles.num_keys // shape.page_size)


def _batches(tiles: _Tiles, shape: TileShape) -> Iterator[tuple[int, Ints]]:
    """(row class, tile indices) of every group: one row class, like key lengths, bounded working set."""
    row_class = _power_of_two_at_least(tiles.num_rows)
    num_pages = _num_pages(tiles, shape)
    order = np.lexsort((-num_pages, row_class))
    row_class, num_pages = row_class[order], num_pages[order]
    begin = 0
    while begin < len(order):
        rows = int(row_class[begin])
        key_bytes = shape.num_kv_heads * shape.head_dim * shape.element_bytes
        key_bytes += shape.num_heads * rows * 2 * shape.element_bytes
        tile_bytes = shape.page_size * key_bytes * num_pages[begin : np.searchsorted(row_class, rows, side="right")]
        padding = np.cumsum(tile_bytes[0] - tile_bytes)
        alike = padding <= PADDING_BYTES + PADDING_SHARE * np.cumsum(tile_bytes)
        num_alike = len(alike) if alike.all() else int(alike.argmin())
        num_groups = -(-num_alike // max(1, GROUP_BYTES // int(tile_bytes[0])))
        end = begin + -(-num_alike // num_groups)
        # Tiles in the order of their rows read q and write the output in order, often as one slice.
        yield rows, np.sort(order[begin:end])
        begin = end


def _group(tiles: _Tiles, row_class: int, spans: Spans, shape: TileShape) -> TileGroup:
    num_tiles, page_size = len(tiles.row), shape.page_size
    num_keys_N = tiles.num_keys
    pages_N = _num_pages(tiles, shape)
    most_pages = int(pages_N.max())
    num_keys = most_pages * page_size

    step_R = np.arange(row_class)
    within_NR = step_R < tiles.num_rows[:, None]
    row_NR = tiles.row[:, None] + np.minimum(step_R, tiles.num_rows[:, None] - 1)
    out_row_NR = np.where(within_NR, row_NR, spans.num_rows)
    flat_rows = row_NR.reshape(-1)
    is_run = bool(within_NR.all()) and bool((np.diff(flat_rows) == 1).all())

    page_J = np.arange(most_pages)
    page_NJ = np.where(page_J < pages_N[:, None], page_J, 0)
    page_id_NJ = spans.pages[spans.page_offset_C[tiles.chunk][:, None] + page_NJ]
    head_base_K = np.arange(shape.num_kv_heads)[:, None] * shape.num_pages
    pages_NKJ = page_id_NJ[:, None, :] + head_base_K

    num_seen_NR = tiles.position[:, None] + np.minimum(step_R, tiles.num_rows[:, None] - 1) + 1
    num_seen_NKR = np.repeat(num_seen_NR, shape.num_kv_heads, axis=0)

    slot_S = np.arange(page_size)
    unused_NL = (page_NJ[:, :, None] * page_size + slot_S >= num_keys_N[:, None, None]).reshape(num_tiles, num_keys)
    tile, key = np.nonzero(unused_NL)
    head_K = np.arange(shape.num_kv_heads)[:, None]
    unused = ((tile * shape.num_kv_heads + head_K) * num_keys + key).reshape(-1)

    return TileGroup(
        num_tiles=num_tiles,
        num_rows=row_class,
        num_keys=num_keys,
        q_rows_NR=torch.from_numpy(flat_rows),
        out_rows_NR=torch.from_numpy(out_row_NR.reshape(-1)),
        first_row=int(flat_rows[0]) if is_run else None,
        pages_NKJ=torch.from_numpy(pages_NKJ.reshape(-1)),
        num_seen_NKR=torch.from_numpy(num_seen_NKR.reshape(-1)),
        unused_slots=torch.from_numpy(unused) if unused.size else None,
    )
