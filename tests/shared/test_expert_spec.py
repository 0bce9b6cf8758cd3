"""The grammar that says which experts are meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokmoe.errors import ConfigError
from grokmoe.expert_ranges import ranges_of
from grokmoe.expert_spec import describe_ranges, describe_units, parse_experts
from grokmoe.expert_units import expert_of, slice_of, unit_of, units_of

HALVES = units_of(2, 2)


@pytest.mark.parametrize(
    ("spec", "held"),
    [
        ("all", {0: (0, 1, 2, 3), 1: (0, 1, 2, 3), 2: (0, 1, 2, 3)}),
        ("2", {0: (2,), 1: (2,), 2: (2,)}),
        ("0, 2-3", {0: (0, 2, 3), 1: (0, 2, 3), 2: (0, 2, 3)}),
        ("1@2", {2: (1,)}),
        (" none ", {}),
        ("all@0,2", {0: (0, 1, 2, 3), 2: (0, 1, 2, 3)}),
        ("0-1@0-1+1-2@1+3@all", {0: (0, 1, 3), 1: (0, 1, 2, 3), 2: (3,)}),
        ("2:1/2@0", {0: HALVES[:1]}),
        ("2 : 2 / 2 @ 1", {1: HALVES[1:]}),
        ("2:all/2@0", {0: HALVES}),
        ("2:1-2/2@0", {0: HALVES}),
        ("2:1/1@0", {0: (2,)}),
        ("0-1:2-3,5/6@1", {1: tuple(unit_of(e, s, 6) for s in (1, 2, 4) for e in (0, 1))}),
        ("0@0+2:1/2@0+2:1/2@0-1", {0: (0, HALVES[0]), 1: HALVES[:1]}),
    ],
)
def test_what_is_meant(spec: str, held: dict[int, tuple[int, ...]]) -> None:
    assert parse_experts(spec, num_experts=4, num_layers=3) == held
    assert list(parse_experts(spec, 4, 3)) == sorted(held)


@pytest.mark.parametrize(
    ("spec", "word"),
    [("4", "experts 0 to 3"), ("0@3", "layers 0 to 2"), ("2-1", "empty"), ("", "no expert"), ("0@", "no layer")]
    + [(text, "no expert") for text in ("x", "none+1", "none@0", "-1", "0-", "0,,1", "0+", "1.5", "0-1-2", "٣")]
    + [
        ("0:", "'' is no slice such as 1/2"),
        ("0:1", "'1' is no slice such as 1/2"),
        ("0:/2", "'' is no slice number"),
        ("0:1/", "'1/' is no slice such as 1/2"),
        ("0:1/x", "'1/x' is no slice such as 1/2"),
        ("0:1/2:1/2", "'1/2:1/2' is no slice such as 1/2"),
        ("0:0/2", "of 2 slices there are 1 to 2, there is no 0"),
        ("0:3/2", "of 2 slices there are 1 to 2, there is no 3"),
        ("0:2-1/2", "the range '2-1' is empty"),
        ("0:1/0", "0 slices of an expert, must be from 1 to 1024"),
        ("0:1-999999999/999999999", "999999999 slices of an expert, must be from 1 to 1024"),
        ("0-999999999", "there is no 999999999"),
        (":1/2", "'' is no expert number"),
        ("0@1:1/2", "'1:1/2' is no layer number"),
    ],
)
def test_what_is_malformed(spec: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse_experts(spec, num_experts=4, num_layers=3)


@given(st.text("0123456789-,@+:/al ", max_size=14))
def test_nothing_else_fails(spec: str) -> None:
    try:
        held = parse_experts(spec, num_experts=4, num_layers=3)
    except ConfigError:
        return
    assert held
    for layer, units in held.items():
        assert 0 <= layer < 3
        assert units
        assert sorted(set(units)) == list(units)
        assert set(map(expert_of, units)) <= set(range(4))
        assert all(0 <= each.slice < each.num_slices for each in map(slice_of, units))


UNITS = [0, 1, 2, 3, *units_of(0, 2), *units_of(1, 2), *units_of(1, 4), *units_of(3, 4)]


@given(st.frozensets(st.tuples(st.integers(0, 5), st.sampled_from(UNITS))))
def test_words_and_back(pairs: frozenset[tuple[int, int]]) -> None:
    held = parse_experts(describe_ranges(ranges_of(pairs)), 4, 6)
    assert {(layer, unit) for layer, units in held.items() for unit in units} == pairs
    of_first = {unit for layer, unit in pairs if layer == 0}
    assert set(parse_experts(describe_units(of_first), 4, 1).get(0, ())) == of_first


@pytest.mark.parametrize(
    "spec",
    ["none", "0-1@0-1+3@0-2", "0-3:1/2@0-31", "5,7:1-3,5/8@2,4+1@3", "1@0+2:1/2@0+3:1-2/2@0", "7@0-7+0-3:2/2@0-63"],
)
def test_the_words_are_the_shortest(spec: str) -> None:
    held = parse_experts(spec, 8, 64)
    assert describe_ranges(ranges_of((layer, unit) for layer, units in held.items() for unit in units)) == spec
