"""Who holds what: every pair once, no card over its room, the words of an expert worker's settings."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from grokmoe.errors import ConfigError
from grokmoe.expert_spec import parse_experts
from planner.layout import fill, lay_out
from planner.presets import PRESETS

CARD = PRESETS["h100"]

ROOMS = st.lists(st.tuples(st.integers(1, 80), st.floats(0.1, 10)), min_size=1, max_size=9)


@given(rooms=ROOMS, num_experts=st.integers(1, 8), num_layers=st.integers(1, 9))
def test_every_pair_has_one_card_and_the_words_say_so(rooms, num_experts, num_layers) -> None:
    assume(sum(room for room, _ in rooms) >= num_experts * num_layers)
    devices = [dataclasses.replace(CARD, bandwidth=speed * 1e12) for _, speed in rooms]
    layout = lay_out(devices, [room for room, _ in rooms], num_experts, num_layers)
    seen = []
    most = {id(device): room for device, (room, _) in zip(devices, rooms, strict=True)}
    for card in layout.cards:
        assert 0 < card.last - card.first <= most[id(card.device)]
        told = parse_experts(layout.spec(card), num_experts, num_layers)
        for layer in range(num_layers):
            assert told.get(layer, ()) == layout.held(card, layer)
        seen += [(expert, layer) for layer, experts in told.items() for expert in experts]
    assert sorted(seen) == [(expert, layer) for expert in range(num_experts) for layer in range(num_layers)]


def test_cards_alike_get_whole_experts() -> None:
    for num, specs in ((8, [str(e) for e in range(8)]), (4, ["0-1", "2-3", "4-5", "6-7"]), (1, ["0-7"])):
        layout = lay_out([CARD] * num, [512] * num, 8, 64)
        assert [layout.spec(card) for card in layout.cards] == specs


def test_a_card_too_small_for_an_expert_gets_some_layers() -> None:
    layout = lay_out([CARD] * 16, [36] * 16, 8, 64)
    assert [layout.spec(card) for card in layout.cards][:3] == ["0@0-31", "0@32-63", "1@0-31"]


def test_a_faster_card_gets_more() -> None:
    slow, fast = PRESETS["l40s"], PRESETS["h200"]
    layout = lay_out([fast, slow], [512, 512], 8, 64)
    lengths = [card.last - card.first for card in layout.cards]
    assert lengths[0] / lengths[1] == pytest.approx(fast.bandwidth / slow.bandwidth, rel=0.05)


def test_too_little_room_is_said() -> None:
    with pytest.raises(ConfigError, match="hold 511 of the 512"):
        lay_out([CARD] * 2, [255, 256], 8, 64)


@given(rooms=ROOMS, total=st.floats(0.1, 500))
def test_shares_fill_up_and_stay_within_their_rooms(rooms, total) -> None:
    assume(sum(room for room, _ in rooms) >= total)
    shares = fill([speed for _, speed in rooms], [room for room, _ in rooms], total)
    assert sum(shares) == pytest.approx(total)
    assert all(share <= room * (1 + 1e-9) for share, (room, _) in zip(shares, rooms, strict=True))
