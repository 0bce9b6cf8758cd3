"""What a worker holds, layer by layer, and what a caller may ask for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_worker.cells import Cells, by_layer, cells_of
from expert_worker.range_check import check_ranges
from grokmoe.errors import InvalidRequest
from grokmoe.expert_ranges import ranges_of
from grokmoe.expert_units import unit_of

NUM_EXPERTS, NUM_LAYERS, FFN = 4, 6, 64
CELLS = st.frozensets(
    st.tuples(st.integers(0, NUM_LAYERS - 1), st.sampled_from([0, 1, 3, unit_of(2, 0, 2), unit_of(2, 1, 2)]))
)


@given(CELLS)
def test_layers_and_back(cells: Cells) -> None:
    found = by_layer(cells)
    assert cells_of(found) == cells
    assert list(found) == sorted(found)
    assert all(list(units) == sorted(units) for units in found.values())
    if cells:
        assert check_ranges(ranges_of(cells), NUM_EXPERTS, NUM_LAYERS, FFN) == cells


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
        ([(unit_of(4, 0, 2), 0, 6)], "experts[0].expert", "is 4, the model has experts 0 to 3"),
        ([(unit_of(1, 2, 3), 0, 6)], "experts[0].num_slices", "is 3, which does not divide the ffn dimension 64"),
        ([(unit_of(1, 2, 4), 0, 6)], "experts[0].num_slices", "slices 16 wide .* must be a multiple of 32"),
        ([(unit_of(1, 0, 2), 0, 1)] * 49, "experts", "has 49 ranges, limit is 48"),
    ],
)
def test_what_cannot_be_asked_for(asked: list[tuple[int, int, int]], field: str, word: str) -> None:
    with pytest.raises(InvalidRequest, match=word) as raised:
        check_ranges(asked, NUM_EXPERTS, NUM_LAYERS, FFN)
    assert raised.value.field == field


def test_ranges_may_overlap() -> None:
    assert check_ranges([(1, 0, 2), (1, 1, 3)], NUM_EXPERTS, NUM_LAYERS, FFN) == {(0, 1), (1, 1), (2, 1)}
