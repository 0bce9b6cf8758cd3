"""The tiling of a step for a GPU: every row meets every key that it may see, once. No GPU and no Triton."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_worker.kernels.device_tiles import FIXED_SPLIT, HEIGHTS, DeviceTiles, plan_device_tiles
from attention_worker.step_batch import StepBatch
from grokmoe.step_plan import SequenceChunk

PAGE = 32


def batch_of(spans: list[tuple[int, int]]) -> StepBatch:
    pages = [tuple(range(-(-(start + length) // PAGE))) for start, length in spans]
    return StepBatch.build(
        [SequenceChunk((1,) * n, start, own) for (start, n), own in zip(spans, pages, strict=True)], PAGE
    )


def ranges_of(tiles: DeviceTiles, group: int) -> dict[int, list[tuple[int, int, int]]]:
    """Row -> (first key, one past the last, where its sums go) of the programs that compute it."""
    found = defaultdict(list)
    for row, tokens, _, _, first, end, partial, _ in tiles.programs_N8.tolist():
        assert 0 < tokens * group <= tiles.height
        for token in range(tokens):
            found[row + token].append((first, end, partial + token if partial >= 0 else -1))
    return found


@settings(max_examples=60)
@given(
    spans=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 300)), min_size=1, max_size=8),
    group=st.sampled_from([1, 3, 6, 20]),
    num_processors=st.sampled_from([1, 8, 132]),
    deterministic=st.booleans(),
)
def test_every_row_meets_its_keys_once(
    spans: list[tuple[int, int]], group: int, num_processors: int, deterministic: bool
) -> None:
    """In one program that writes the row, or in several whose sums the row's entry names in the order of the keys."""
    batch = batch_of(spans)
    rows = []
    for tiles in plan_device_tiles(batch.spans, group, 8, num_processors, deterministic):
        sums = {row: (first, step, count) for row, first, step, count in tiles.split_R4.tolist()}
        taken: list[int] = []
        for row, parts in ranges_of(tiles, group).items():
            rows.append(row)
            parts.sort()
            assert parts[0][0] == 0
            assert parts[-1][1] > batch.positions_T[row]
            assert all(left[1] == right[0] for left, right in pairwise(parts))
            if row in sums:
                first, step, count = sums[row]
                assert [partial for *_, partial in parts] == [first + part * step for part in range(count)]
                taken += [partial for *_, partial in parts]
            else:
                assert [partial for *_, partial in parts] == [-1]
        assert sorted(taken) == list(range(tiles.num_partial)), "two programs write the same sums"
    assert sorted(rows) == list(range(len(batch.positions_T)))


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 40)), min_size=1, max_size=8))
def test_deterministic_splits_are_the_same_in_any_company(spans: list[tuple[int, int]]) -> None:
    (tiles,) = plan_device_tiles(batch_of(spans).spans, 6, 8, 132, deterministic=True)
    assert tiles.height == HEIGHTS.fixed
    first, end = tiles.programs_N8[:, 4], tiles.programs_N8[:, 5]
    assert not (first % FIXED_SPLIT).any()
    assert (np.minimum(end - first, FIXED_SPLIT) == end - first).all()


def test_a_lone_decode_fills_the_chip_and_many_are_not_split() -> None:
    (one,) = plan_device_tiles(batch_of([(8000, 1)]).spans, 6, 8, 132, deterministic=False)
    assert 8 * len(one.programs_N8) >= 2 * 120
    (many,) = plan_device_tiles(batch_of([(8000, 1)] * 40).spans, 6, 8, 132, deterministic=False)
    assert len(many.programs_N8) == 40
    assert not many.num_partial


def test_the_longest_programs_start_first() -> None:
    (tiles,) = plan_device_tiles(batch_of([(10, 1), (900, 1), (300, 1)]).spans, 6, 8, 1, deterministic=False)
    assert tiles.programs_N8[:, 5].tolist() == [901, 301, 11]
