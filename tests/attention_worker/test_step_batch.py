"""The tensors that a step's layers share."""

from __future__ import annotations

import pytest
import torch

from attention_worker.kernels.tiles import TileShape
from attention_worker.kv_cache import KVCache
from attention_worker.step_batch import StepBatch
from grokmoe.step_plan import SequenceChunk

SHAPE = TileShape(num_heads=4, num_kv_heads=2, head_dim=8, num_pages=100, page_size=4, element_bytes=4)


def test_rows_follow_the_chunks() -> None:
    batch = StepBatch.build(
        [
            SequenceChunk((11, 12, 13), 3, (7, 2)),
            SequenceChunk((14,), 0, (5,)),
            SequenceChunk((15, 16), 8, (1, 0, 3)),
        ],
        page_size=4,
    )
    assert batch.token_ids_T.tolist() == [11, 12, 13, 14, 15, 16]
    assert batch.positions_T.tolist() == [3, 4, 5, 0, 8, 9]
    assert batch.slots_T.tolist() == [7 * 4 + 3, 2 * 4, 2 * 4 + 1, 5 * 4, 3 * 4, 3 * 4 + 1]
    tensors = (batch.token_ids_T, batch.positions_T, batch.slots_T)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_empty() -> None:
    batch = StepBatch.build([], page_size=4)
    assert len(batch.token_ids_T) == len(batch.slots_T) == 0
    assert batch.tile_groups(SHAPE) == ()


@pytest.mark.parametrize(
    ("chunk", "match"),
    [
        (SequenceChunk((), 0, (1,)), "0 tokens"),
        (SequenceChunk((1,), -1, (1,)), "position -1"),
        (SequenceChunk((1,), 4, (1,)), "hold no 5 positions"),
        (SequenceChunk((1,), 0, (-1,)), "negative page"),
    ],
)
def test_chunks_that_make_no_sense_are_refused(chunk: SequenceChunk, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        StepBatch.build([chunk], page_size=4)


def test_page_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="page size 0"):
        StepBatch.build([], page_size=0)


def test_tiles_cover_every_row_once_and_are_planned_once() -> None:
    spans = [(0, 1), (0, 200), (9, 33), (70, 1), (71, 1), (5, 64)]
    chunks, page = [], 0
    for start, length in spans:
        count = -(-(start + length) // 4)
        chunks.append(SequenceChunk((1,) * length, start, tuple(range(page, page + count))))
        page += count
    batch = StepBatch.build(chunks, page_size=4)
    shape = TileShape(4, 2, 8, page, 4, 4)
    groups = batch.tile_groups(shape)
    assert batch.tile_groups(shape) is groups
    num_rows = len(batch.slots_T)
    rows = [row for group in groups for row in group.out_rows_NR.tolist() if row < num_rows]
    assert sorted(rows) == list(range(num_rows))
    for group in groups:
        assert len(group.pages_NKJ) == group.num_tiles * 2 * group.num_keys // 4


def test_cache_has_pages_of_every_layer() -> None:
    cache = KVCache(2, num_pages=5, page_size=4, num_kv_heads=2, head_dim=8, dtype=torch.bfloat16, device="cpu")
    assert cache.bytes == 2 * 2 * 5 * 4 * 2 * 8 * 2
    assert [pages.shape for pages in (*cache.k_KPSd, *cache.v_KPSd)] == [(2, 5, 4, 8)] * 4


def test_rows_apart_are_those_of_short_chunks() -> None:
    chunks = [
        SequenceChunk((1,) * 2, 3, (7, 4)),
        SequenceChunk((1,) * 9, 0, (1, 2, 3)),
        SequenceChunk((1,), 8, (5, 6, 0)),
    ]
    batch = StepBatch.build(chunks, page_size=4)
    apart = batch.rows_apart(2)
    assert apart.rows_R.tolist() == [0, 1, 11]
    assert batch.rows_apart(None).rows_R.tolist() == list(range(12))
    for row, (keys, first_page) in {0: (4, 7), 1: (5, 7), 2: (1, 1), 10: (9, 1), 11: (9, 5)}.items():
        assert apart.num_keys_T[row] == keys
        assert apart.pages[apart.offsets_T[row]] == first_page


def test_cache_sizes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        KVCache(1, 0, 4, 2, 8, torch.float32, "cpu")
