"""The grammar that says which experts a worker holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_worker.config import ExpertWorkerSettings, parse_experts
from grokmoe.errors import ConfigError


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
    ],
)
def test_parse_experts(spec: str, held: dict[int, tuple[int, ...]]) -> None:
    assert parse_experts(spec, num_experts=4, num_layers=3) == held
    assert list(parse_experts(spec, 4, 3)) == sorted(held)


@pytest.mark.parametrize(
    ("spec", "word"),
    [("4", "experts 0 to 3"), ("0@3", "layers 0 to 2"), ("2-1", "empty"), ("", "no expert"), ("0@", "no layer")]
    + [(text, "no expert") for text in ("x", "none+1", "none@0", "-1", "0-", "0,,1", "0+", "1.5", "0-1-2", "٣")],
)
def test_parse_experts_refuses(spec: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse_experts(spec, num_experts=4, num_layers=3)


@given(st.text("0123456789-,@+al ", max_size=12))
def test_parse_experts_never_fails_otherwise(spec: str) -> None:
    try:
        held = parse_experts(spec, num_experts=4, num_layers=3)
    except ConfigError:
        return
    assert held
    for layer, experts in held.items():
        assert 0 <= layer < 3
        assert experts
        assert sorted(set(experts)) == list(experts)
        assert set(experts) <= set(range(4))


@pytest.mark.parametrize("field", ["capacity", "threads", "max_rows", "max_batch_rows"])
def test_settings_refuse_what_cannot_be(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        ExpertWorkerSettings(**{field: -1})
