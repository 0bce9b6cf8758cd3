"""From sequences to what an attention worker is asked: what changes from token to token, and what never does."""

from __future__ import annotations

import math
from typing import Any

from grokmoe.step_plan import LogprobTable, StepResult, TokenScoring, pack_ids
from router.plan_writer import read_extras, write_plan
from router.request import Request, SamplingSettings
from router.sequence import Sequence
from router.step import Chunk, Step


def sequence(index: int = 0, **fields: Any) -> Sequence:
    one = Sequence(Request(request_id="r", prompt_ids=(5, 6, 7), **fields), 0, index)
    one.admit((1,), 0)
    return one


def asked(one: Sequence, wants_token: bool = True) -> Any:
    """What is asked of the next chunk: all that is left to compute."""
    chunk = Chunk(one, one.num_computed, tuple(one.all_ids[one.num_computed :]), (1,), wants_token)
    (written,) = write_plan(Step((chunk,)), "i").chunks
    return written


def draw(one: Sequence, token_id: int) -> None:
    one.num_computed = one.num_tokens
    one.append(token_id)


def test_what_is_certain_is_made_once() -> None:
    one = sequence(sampling=SamplingSettings(temperature=0.5, seed=9, logit_bias=((3, 1.0),)), logprobs=2)
    first = asked(one).sampling
    assert (first.temperature, first.seed, first.bias_ids, first.num_logprobs) == (0.5, 9, (3,), 2)
    draw(one, 8)
    assert asked(one).sampling is first


def test_every_candidate_has_a_seed_of_its_own() -> None:
    how = SamplingSettings(seed=9)
    assert asked(sequence(0, sampling=how)).sampling.seed == 9
    assert asked(sequence(1, sampling=how)).sampling.seed == how.seed_of(1) != 9


def test_stop_tokens_are_barred_until_there_are_enough() -> None:
    how = SamplingSettings(logit_bias=((2, 50.0), (3, 1.0)))
    one = sequence(sampling=how, min_tokens=1, stop_ids=frozenset({2}))
    barred = asked(one).sampling
    assert dict(zip(barred.bias_ids, barred.bias, strict=True)) == {3: 1.0, 2: -math.inf}
    draw(one, 8)
    free = asked(one).sampling
    assert dict(zip(free.bias_ids, free.bias, strict=True)) == {3: 1.0, 2: 50.0}


def test_penalties_see_every_token() -> None:
    one = sequence(sampling=SamplingSettings(presence_penalty=1.0))
    assert asked(one).sampling.penalties.output_ids == b""
    for count in (1, 2):
        draw(one, 8)
        penalties = asked(one).sampling.penalties
        assert penalties.prompt_ids == pack_ids((5, 6, 7))
        assert penalties.output_ids == pack_ids([8] * count)


def test_a_prompt_is_scored_up_to_its_last_token() -> None:
    one = sequence(prompt_logprobs=2)
    assert asked(one).scoring == TokenScoring(0, (6, 7), 2)
    draw(one, 8)
    assert asked(one).scoring is None
    assert asked(sequence(1, prompt_logprobs=2)).scoring is None, "one candidate does it for all"


def test_tables_find_their_chunks() -> None:
    scored, plain, drawn = sequence(prompt_logprobs=0), sequence(), sequence(logprobs=0)
    step = Step(tuple(Chunk(one, 0, (5, 6, 7), (1,), True) for one in (scored, plain, drawn)))
    tables = [LogprobTable((6, 7), (-1.0, -2.0), (1, 2)), LogprobTable((9,), (-3.0,), (3,))]
    first, second = read_extras(step, write_plan(step, "i"), StepResult((1, 2, 9), None, tuple(tables)))
    assert (first.chunk.sequence, first.prompt_logprobs, first.logprobs) == (scored, tables[0], None)
    assert (second.chunk.sequence, second.prompt_logprobs, second.logprobs) == (drawn, None, tables[1])
