"""Sets of (layer, expert) as ranges and as words, and what a caller may ask for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_worker.cells import Cells, by_layer, cells_of, ranges, spec
from expert_worker.config import parse_experts
from expert_worker.range_check import check_ranges
from grokmoe.errors import InvalidRequest

NUM_EXPERTS, NUM_LAYERS = 4, 6
CELLS = st.frozensets(st.tuples(st.integers(0, NUM_LAYERS - 1), st.integers(0, NUM_EXPERTS - 1)))


@given(CELLS)
def test_ranges_and_back(cells: Cells) -> None:
    found = ranges(cells)
    assert found == sorted(found)
    assert len({layer for _, begin, end in found for layer in (begin, end)}) <= 2 * len(found)
    if cells:
        assert check_ranges(found, NUM_EXPERTS, NUM_LAYERS) == cells
    joined = [(left, right) for left in found for right in found if left[0] == right[0] and left[2] == right[1]]
    assert not joined, "two ranges that are one"


@given(CELLS)
def test_words_and_back(cells: Cells) -> None:
    assert cells_of(parse_experts(spec(cells), NUM_EXPERTS, NUM_LAYERS)) == cells
    assert cells_of(by_layer(cells)) == cells


def test_words() -> None:
    assert spec(frozenset()) == "none"
    assert spec(cells_of({0: (0, 1, 3), 1: (0, 1, 3), 2: (3,)})) == "0-1,3@0-1+3@2"


@pytest.mark.parametrize(
    ("asked", "field", "word"),
    [
        ([], "experts", "empty"),
        ([(4, 0, 6)], "experts[0].expert", "is 4, the model has experts 0 to 3"),
        ([(0, 0, 6), (1, 0, 7)], "experts[1].layer_end", "is 7, the model has 6 layers"),
        ([(0, 3, 3)], "experts[0].layer_end", "more than layer_begin, which is 3"),
        ([(0, 2**32 - 1, 2)], "experts[0].layer_end", "more than layer_begin"),
        ([(0, 0, 2**32 - 1)], "experts[0].layer_end", "the model has 6 layers"),
        ([(0, 0, 1)] * 25, "experts", "has 25 ranges, limit is 24"),
    ],
)
def test_what_cannot_be_asked_for(asked: list[tuple[int, int, int]], field: str, word: str) -> None:
    with pytest.raises(InvalidRequest, match=word) as raised:
        check_ranges(asked, NUM_EXPERTS, NUM_LAYERS)
    assert raised.value.field == field


def test_ranges_may_overlap() -> None:
    assert check_ranges([(1, 0, 2), (1, 1, 3)], NUM_EXPERTS, NUM_LAYERS) == {(0, 1), (1, 1), (2, 1)}
