"""Made-up prompts: their lengths, what they share, and what they do not."""

from __future__ import annotations

import asyncio
import collections

import pytest

from grokmoe.errors import ConfigError
from loadtest.inputs import FIRST_ID, block_ids, prefix_inputs, random_inputs
from loadtest.lengths import fixed, parse_lengths
from loadtest.planned import Input, plan_requests, split
from loadtest.settings import LoadSettings
from loadtest.source import Source, times


async def count_words(text: str) -> int:
    return len(text.split())


def source(**changes):
    return Source(LoadSettings(**changes), 1000, 1024, count_words)


def test_random_prompts_share_nothing_but_what_was_asked_for() -> None:
    inputs = random_inputs(200, fixed(20), fixed(5), 5000, 1, prefix_len=7)
    assert {len(each.prompt) for each in inputs} == {27}
    assert len({each.prompt[:7] for each in inputs}) == 1
    assert len({each.prompt[7:10] for each in inputs}) == 200
    assert all(FIRST_ID <= token < 5000 for each in inputs for token in each.prompt)


def test_the_seed_decides() -> None:
    lengths = parse_lengths("uniform:5:50")
    assert random_inputs(9, lengths, lengths, 500, 3) == random_inputs(9, lengths, lengths, 500, 3)
    assert random_inputs(9, lengths, lengths, 500, 3) != random_inputs(9, lengths, lengths, 500, 4)


def test_each_prefix_is_used_equally_often() -> None:
    inputs = prefix_inputs(60, 6, 16, fixed(4), fixed(5), 5000, 1)
    counts = collections.Counter(each.prompt[:16] for each in inputs)
    assert sorted(counts.values()) == [10] * 6
    assert len({each.prompt for each in inputs}) == 60


def test_blocks_of_one_name_are_the_same() -> None:
    assert block_ids(5, 32, 1000, 0) == block_ids(5, 32, 1000, 0)
    assert block_ids(5, 32, 1000, 0) != block_ids(6, 32, 1000, 0)


def test_made_up_prompts_that_do_not_fit_the_context_are_an_error() -> None:
    with pytest.raises(ConfigError, match="1152 tokens"):
        asyncio.run(source().inputs(3, 0))
    assert len(asyncio.run(source(input_len="1000", output_len="24").inputs(3, 0))) == 3


def test_a_plan_can_leave_streams_early() -> None:
    plan = plan_requests(
        [Input((5,), 10)] * 1000, times(LoadSettings(request_rate=5.0), [Input((5,), 10)] * 1000, 0), 0.25
    )
    leaves = [each.leave_after for each in plan if each.leave_after is not None]
    assert 200 < len(leaves) < 300
    assert set(leaves) == set(range(1, 10))  # before the end: a stream that has ended is not left


def test_parts_of_a_plan_are_the_plan() -> None:
    plan = plan_requests([Input((5,), 10)] * 7, times(LoadSettings(request_rate=5.0), [Input((5,), 10)] * 7, 0))
    parts = split(plan, 3)
    assert sorted((each for part in parts for each in part), key=lambda each: each.index) == plan
    assert [len(part) for part in parts] == [3, 2, 2]
