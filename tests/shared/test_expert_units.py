"""Numbers of experts and slices, ranges of them, and what can be cut."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokmoe.errors import ConfigError, InvalidRequest
from grokmoe.expert_messages import from_messages, name_units, named_units, to_messages
from grokmoe.expert_ranges import pairs_of, ranges_of, size_of
from grokmoe.expert_units import (
    FIRST_SLICE,
    MAX_EXPERT,
    MAX_SLICES,
    check_slicing,
    describe_unit,
    expert_of,
    num_slices_of,
    slice_of,
    slicing_fault,
    unit_of,
    units_of,
)
from grokmoe.model_config import GROK1
from grokmoe.v1.expert_pb2 import ExpertRange, ForwardRequest


@st.composite
def units(draw: st.DrawFn) -> int:
    num_slices = draw(st.integers(1, MAX_SLICES))
    return unit_of(draw(st.integers(0, MAX_EXPERT)), draw(st.integers(0, num_slices - 1)), num_slices)


@given(units())
def test_a_number_means_one_slice(unit: int) -> None:
    assert unit_of(*slice_of(unit)) == unit
    assert slice_of(unit)[::2] == (expert_of(unit), num_slices_of(unit))
    assert (unit >= FIRST_SLICE) == (num_slices_of(unit) > 1)


@given(st.lists(units(), unique=True))
def test_ascending_numbers_put_equal_widths_together(some: list[int]) -> None:
    told = [(each.num_slices, each.slice, each.expert) for each in map(slice_of, sorted(some))]
    assert told == sorted(told)


def test_a_whole_experts_number_is_its_own() -> None:
    assert [unit_of(expert) for expert in range(8)] == list(range(8))
    assert [describe_unit(unit) for unit in (3, *units_of(3, 2))] == ["3", "3:1/2", "3:2/2"]


@pytest.mark.parametrize(
    ("num_slices", "ffn_size", "fault"),
    [
        (1, 33, ""),
        (2, 64, ""),
        (1024, GROK1.intermediate_size, ""),
        (0, 64, "is 0, must be from 1 to 1024"),
        (1025, 64, "is 1025, must be from 1 to 1024"),
        (3, 64, "is 3, which does not divide the ffn dimension 64"),
        (4, 64, "is 4: slices 16 wide of the ffn dimension 64, must be a multiple of 32"),
    ],
)
def test_what_can_be_cut(num_slices: int, ffn_size: int, fault: str) -> None:
    assert slicing_fault(num_slices, ffn_size) == fault
    if not fault:
        check_slicing("it", num_slices, ffn_size)
        return
    with pytest.raises(ConfigError, match=f"it {fault}"):
        check_slicing("it", num_slices, ffn_size)


@given(st.sets(st.tuples(st.integers(0, 6), st.sampled_from([0, 1, 4, *units_of(0, 2), unit_of(1, 1, 3)]))))
def test_ranges_name_exactly_the_pairs(pairs: set[tuple[int, int]]) -> None:
    ranges = ranges_of(pairs)
    assert pairs_of(ranges) == pairs
    assert list(ranges) == sorted(ranges)
    for (unit, _, end), (other, begin, _) in itertools.pairwise(ranges):
        assert unit != other or end < begin, "as few as can be"
    assert from_messages([ExpertRange.FromString(each.SerializeToString()) for each in to_messages(ranges)]) == [
        *ranges
    ]


def test_the_order_is_by_expert_and_layer() -> None:
    assert ranges_of({(0, 1), (1, 1), (0, 0), (3, 1)}) == ((0, 0, 1), (1, 0, 2), (1, 3, 4))
    assert ranges_of([]) == ()


def test_a_slice_is_its_part_of_an_expert() -> None:
    assert size_of([(0, 0), (1, 0), (0, unit_of(1, 0, 3)), (0, unit_of(2, 2, 3)), (5, unit_of(2, 2, 4))]) == Fraction(
        35, 12
    )
    assert size_of([]) == 0


def test_of_whole_experts_nothing_is_said_of_slices() -> None:
    (message,) = to_messages([(3, 0, 2)])
    assert message == ExpertRange(expert=3, layer_end=2)
    assert from_messages([ExpertRange(expert=3, layer_end=2, num_slices=1)]) == [(3, 0, 2)]
    request = ForwardRequest()
    name_units(request, (0, 5))
    assert request == ForwardRequest(expert_ids=[0, 5])


@given(st.lists(units(), unique=True).map(sorted))
def test_units_of_a_request_and_back(some: list[int]) -> None:
    request = ForwardRequest()
    name_units(request, some)
    assert named_units(ForwardRequest.FromString(request.SerializeToString())) == tuple(some)


@pytest.mark.parametrize(
    ("message", "field", "words"),
    [
        (ExpertRange(expert=1, slice=2, num_slices=2), "experts[1].slice", "is 2, of 2 slices"),
        (ExpertRange(expert=1, slice=1), "experts[1].slice", "is 1, of 1 slices"),
        (ExpertRange(expert=1, num_slices=1025), "experts[1].num_slices", "must be at most 1024"),
        (ExpertRange(expert=1 << 16), "experts[1].expert", "must be at most 65535"),
    ],
)
def test_ranges_that_no_expert_has(message: ExpertRange, field: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as raised:
        from_messages([ExpertRange(), message])
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("request_", "field", "words"),
    [
        (ForwardRequest(expert_ids=[0, 1], slices=[0], num_slices=[2, 2]), "slices", "has 1 entries for 2"),
        (ForwardRequest(expert_ids=[0], slices=[0]), "num_slices", "has 0 entries for 1"),
        (ForwardRequest(expert_ids=[0], slices=[2], num_slices=[2]), "slices", "has 2, of 2 slices"),
        (ForwardRequest(expert_ids=[0], slices=[0], num_slices=[0]), "num_slices", "has 0, must be from 1"),
        (ForwardRequest(expert_ids=[0], slices=[0], num_slices=[2**32 - 1]), "num_slices", "must be from 1 to 1024"),
        (ForwardRequest(expert_ids=[2**32 - 1], slices=[0], num_slices=[2]), "expert_ids", "must be at most 65535"),
    ],
)
def test_requests_that_name_no_slice(request_: ForwardRequest, field: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as raised:
        named_units(request_)
    assert raised.value.field == field
