"""What models weigh, against figures that were worked out elsewhere."""

from __future__ import annotations

import dataclasses

import pytest

from grokmoe.errors import ConfigError
from grokmoe.model_config import GROK1, TINY
from planner.device import GIB
from planner.memory import attention_memory, attention_weights_gib, expert_memory, expert_room
from planner.model_size import all_params, expert_bytes, kv_bytes
from planner.presets import PRESETS


def test_grok_1() -> None:
    assert all_params(GROK1) / 1e9 == pytest.approx(315.7, abs=0.1)
    assert GROK1.num_layers * expert_bytes(GROK1, "bfloat16") == 72 * GIB
    assert kv_bytes(GROK1, "bfloat16") == 256 * 1024
    assert attention_weights_gib(GROK1, "bfloat16") == pytest.approx(13.5, abs=0.01)


def test_an_untied_embedding_counts_twice() -> None:
    untied = dataclasses.replace(TINY, tie_word_embeddings=False)
    assert all_params(untied) - all_params(TINY) == TINY.vocab_size * TINY.hidden_size


@pytest.mark.parametrize(
    ("device", "dtype", "whole"),
    [
        ("h100", "bfloat16", 1),
        ("h100", "float8", 2),
        ("h200", "bfloat16", 1),
        ("h200", "float8", 3),
        ("a100", "bfloat16", 1),
    ],
)
def test_experts_that_a_card_holds(device, dtype, whole) -> None:
    """As the ready-made profiles of the chart have them."""
    assert expert_room(GROK1, dtype, PRESETS[device]) // GROK1.num_layers == whole


def test_an_l40s_holds_half_an_expert() -> None:
    assert 32 <= expert_room(GROK1, "bfloat16", PRESETS["l40s"]) < 64


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_said_to_fit_fits(name) -> None:
    device = PRESETS[name]
    for dtype in device.flops:
        room = expert_room(GROK1, dtype, device)
        assert expert_memory(GROK1, dtype, device, room).need <= 0.95 * device.memory
        one_more = expert_memory(GROK1, dtype, device, room + 2).need
        assert one_more > 0.95 * device.memory - (2 / 64 * 72 if device.kind == "cpu" else 0)


def test_attention_takes_what_is_left_and_no_more() -> None:
    memory = attention_memory(GROK1, "bfloat16", PRESETS["h100"])
    assert memory.need == pytest.approx(0.95 * PRESETS["h100"].memory)
    with pytest.raises(ConfigError, match="leave"):
        attention_memory(GROK1, "bfloat16", PRESETS["h100"], memory.kv + 1)
    with pytest.raises(ConfigError, match="a sequence of 8192 positions needs 2"):
        attention_memory(GROK1, "bfloat16", PRESETS["h100"], 1.0)
