"""How the layers of a model are shared out among the stages of a pipeline."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention_worker.config import parse_layers
from grokmoe.errors import ConfigError
from launcher.stage_layers import stage_layers


@given(st.data())
def test_every_layer_once_and_as_even_as_can_be(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 100))
    num_stages = data.draw(st.integers(1, num_layers))
    held = [parse_layers(spec, num_layers) for spec in stage_layers(num_layers, num_stages)]
    assert [layer for each in held for layer in each] == list(range(num_layers))
    lengths = list(map(len, held))
    assert lengths == sorted(lengths, reverse=True), "the last one has the head, too"
    assert max(lengths) - min(lengths) <= 1


def test_those_that_are_given() -> None:
    assert stage_layers(8, 1, ("0-2", "3-7")) == stage_layers(8, 2, ("0-2", "3-7")) == ("0-2", "3-7")
    assert stage_layers(3, 3, ("0", "1", "2")) == ("0", "1", "2")


@pytest.mark.parametrize(
    ("num_stages", "given", "words"),
    [
        (0, (), "pipeline_stages is 0, must be from 1 to 8"),
        (9, (), "pipeline_stages is 9, must be from 1 to 8"),
        (3, ("0-2", "3-7"), "pipeline_stages is 3, stage_layers 0-2,3-7 names 2"),
        (2, ("0-2", "4-7"), "4-7 must begin with layer 3"),
        (2, ("0-3", "3-7"), "3-7 must begin with layer 4"),
        (2, ("3-7", "0-2"), "3-7 must begin with layer 0"),
        (2, ("0-2", "3-6"), "must end with layer 7"),
        (2, ("0-2", "3-8"), "there is no 8"),
        (2, ("0-2", "x"), "no layer number"),
    ],
)
def test_what_cannot_be(num_stages: int, given: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        stage_layers(8, num_stages, given)
