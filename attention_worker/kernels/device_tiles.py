"""The tiling of one step for a GPU: which query rows meet which keys in one program. Pure; nothing here needs a GPU.

A tile is a run of query rows of one chunk. Its keys are read by one program per KV head, or are split among several,
whose unnormalised sums are put together afterwards, in the order of the keys.

    decode          few rows, many keys: low tiles, split until the chip is full
    prefill         many rows: tall tiles, seldom split
    deterministic   one height for all, and splits of fixed size counted from key 0: a row's bits then follow from its
                    query and its keys alone. A tall tile costs a decode step little, as reading its keys takes longer.

Shapes: N programs per KV head, R rows whose keys were split, C chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attention_worker.kernels.tiles import Spans


class Heights(NamedTuple):
    """Query rows of a tile, all heads of one KV head counted: for chunks of a token or two, for longer ones, and for
    all chunks of a deterministic worker."""

    low: int
    tall: int
    fixed: int


HEIGHTS = Heights(16, 128, 64)
"""For tensor cores."""

HEIGHTS_FLOAT32 = Heights(16, 32, 32)
"""For float32, which is computed by the ordinary units and keeps all of a tile in registers."""

LEAST_SPLIT = 256
"""Fewest keys that are worth a program of their own: with fewer, adding up takes as long as reading."""

FIXED_SPLIT = 512
"""Keys of a split of a deterministic worker."""

PROGRAMS_PER_PROCESSOR = 2
"""Programs that each multiprocessor should find, so that one can load while another computes."""

NO_SPLIT = 1 << 30

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class DeviceTiles:
    """The programs of one tile height.

    height      query rows of a tile, heads of one KV head included
    programs_N8 int32: first row, tokens, position of the first, offset of its chunk's pages, first key, one past the
                last key, first row among the partial sums or -1, and a zero that pads the entry to 32 bytes
    split_R4    int32: row, its first partial row, distance to its next one, how many
    num_partial rows of partial sums
    """

    height: int
    programs_N8: NDArray[np.int32]
    split_R4: NDArray[np.int32]
    num_partial: int


def plan_device_tiles(
    spans: Spans, group: int, num_kv_heads: int, num_processors: int, deterministic: bool, heights: Heights = HEIGHTS
) -> tuple[DeviceTiles, ...]:
    """Programs that cover every row of the step once, per tile height. group: query heads of a KV head."""
    least = _height(group)
    if deterministic:
        plans = [(np.ones(len(spans.length_C), bool), max(heights.fixed, least))]
    else:
        is_low_C = spans.length_C * group <= max(heights.low, least)
        plans = [(is_low_C, max(heights.low, least)), (~is_low_C, max(heights.tall, least))]
    found = []
    for chosen_C, height in plans:
        if chosen_C.any():
            tiles = _cut(spans.select(chosen_C), height // group)
            keys = FIXED_SPLIT if deterministic else _split_size(tiles, num_kv_heads, num_processors)
            found.append(_programs(tiles, height, keys))
    return tuple(found)


def _height(group: int) -> int:
    """The least power of two that holds the heads of one token."""
    return 1 << (group - 1).bit_length()


def _cut(spans: Spans, tokens: int) -> Ints:
    """Tiles as columns: first row, tokens, position, offset of the chunk's pages."""
    tiles_C = -(-spans.length_C // tokens)
    chunk = np.repeat(np.arange(len(tiles_C)), tiles_C)
    offset = (np.arange(len(chunk)) - np.repeat(np.cumsum(tiles_C) - tiles_C, tiles_C)) * tokens
    return np.stack(
        (
            spans.first_row_C[chunk] + offset,
            np.minimum(tokens, spans.length_C[chunk] - offset),
            spans.start_C[chunk] + offset,
            spans.page_offset_C[chunk],
        )
    )


def _split_size(tiles: Ints, num_kv_heads: int, num_processors: int) -> int:
    """Keys per program that give every multiprocessor its programs, where there are fewer tiles than that."""
    wanted = PROGRAMS_PER_PROCESSOR * num_processors
    if tiles.shape[1] * num_kv_heads >= wanted:
        return NO_SPLIT
    num_keys = int((tiles[1] + tiles[2]).sum()) * num_kv_heads
    return max(LEAST_SPLIT, math.ceil(num_keys / wanted / LEAST_SPLIT) * LEAST_SPLIT)


def _programs(tiles: Ints, height: int, split: int) -> DeviceTiles:
    num_tokens, num_keys = tiles[1], tiles[1] + tiles[2]
    parts = -(-num_keys // split)
    tile = np.repeat(np.arange(len(parts)), parts)
    part = np.arange(len(tile)) - np.repeat(np.cumsum(parts) - parts, parts)
    partial_rows = np.where(parts > 1, parts * num_tokens, 0)
    first_partial = np.cumsum(partial_rows) - partial_rows
    partial = np.where(parts[tile] > 1, first_partial[tile] + part * num_tokens[tile], -1)
    first_key = part * split
    end_key = np.minimum(first_key + split, num_keys[tile])
    columns = (*tiles[:, tile], first_key, end_key, partial, np.zeros_like(partial))
    programs_N8 = np.stack(columns, axis=1).astype(np.int32)
    # Programs start in this order: with the longest first, none is still at work when the others have ended.
    programs_N8 = programs_N8[np.argsort(first_key - end_key, kind="stable")]

    split_tiles = np.flatnonzero(parts > 1)
    tile = np.repeat(split_tiles, num_tokens[split_tiles])
    counts = num_tokens[split_tiles]
    token = np.arange(len(tile)) - np.repeat(np.cumsum(counts) - counts, counts)
    split_R4 = np.stack((tiles[0][tile] + token, first_partial[tile] + token, num_tokens[tile], parts[tile]), axis=1)
    return DeviceTiles(height, programs_N8, split_R4.astype(np.int32), int(partial_rows.sum()))
