"""Rows in place of token ids in a step: the bits that their ids give, in one worker, in stages and in ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from attention_worker.recorded_steps import can_be_recorded
from attention_worker.weights import load_weights
from grokmoe.checkpoint import Checkpoint
from grokmoe.errors import InvalidRequest
from grokmoe.plan_codec import num_payload_rows, plan_from_proto, plan_payload, plan_to_proto
from grokmoe.step_plan import GREEDY, LogitsScope, SequenceChunk, StepPlan, StepResult
from grokmoe.v1 import attention_pb2
from tests import goldens
from tests.attention_worker.ranks.rank_threads import rank_threads
from tests.attention_worker.test_pipeline_stages import SPLITS, stages
from tests.attention_worker.tiny_engine import CONFIG, attention_engine, fill, finish, run_step

D = CONFIG.hidden_size


def rows_of(token_ids: tuple[int, ...]) -> torch.Tensor:
    """float32 [tokens, hidden]: what the residual begins with."""
    with Checkpoint.open(goldens.DIRECTORY) as checkpoint:
        embedding_VD = load_weights(checkpoint, torch.float32, torch.device("cpu")).embedding_VD
    assert embedding_VD is not None
    return embedding_VD[list(token_ids)] * CONFIG.embedding_multiplier


def by_rows(chunk: SequenceChunk, num_rows: int | None = None) -> SequenceChunk:
    """Its first tokens by their rows, their ids gone."""
    ids = chunk.token_ids
    num_rows = len(ids) if num_rows is None else num_rows
    zeros = (0,) * num_rows
    return dataclasses.replace(chunk, token_ids=(*zeros, *ids[num_rows:]), embeds=rows_of(ids[:num_rows]))


WHOLE = SequenceChunk(tuple(goldens.PROMPTS["len33"]), 0, (7, 2, 9, 4, 0), GREEDY, LogitsScope.ALL)
OTHER = SequenceChunk(tuple(goldens.PROMPTS["len7"]), 0, (20,), GREEDY)
IDS = (WHOLE, OTHER, SequenceChunk((5, 6), 0, (21,), GREEDY))
MIXED = (by_rows(WHOLE, 20), OTHER, by_rows(IDS[2]))
"""Some tokens of a chunk, none, and all."""


def same(found: StepResult, expected: StepResult, atol: float = 0.0) -> None:
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=atol)
    assert found.token_ids == expected.token_ids


def test_their_ids_give_the_same_bits() -> None:
    expected = run_step(attention_engine(), *IDS)
    same(run_step(attention_engine(), *MIXED), expected)
    assert expected.token_ids[0] == goldens.greedy("seed", "len33")[0]


def test_rows_of_no_token_are_taken_as_they_are() -> None:
    changed = dataclasses.replace(MIXED[0], embeds=MIXED[0].embeds + 0.5)
    logits = run_step(attention_engine(), changed).logits
    assert (logits - run_step(attention_engine(), WHOLE).logits).abs().max() > 0.1


def test_nobody_s_rows_are_written_to() -> None:
    """A residual is added to in place."""
    before = [chunk.embeds.clone() for chunk in (MIXED[0], MIXED[2])]
    run_step(attention_engine(), *MIXED)
    assert all(torch.equal(*pair) for pair in zip(before, (MIXED[0].embeds, MIXED[2].embeds), strict=True))


@pytest.mark.parametrize("cuts", SPLITS)
def test_stages(cuts: tuple[int, ...]) -> None:
    first, *others = stages(cuts)
    result = finish(first.begin(StepPlan(first.incarnation, MIXED)))
    for engine in others:
        result = finish(engine.begin(StepPlan(engine.incarnation, IDS, result.hidden_state)))
    same(result, run_step(attention_engine(), *IDS))


@pytest.mark.parametrize("size", [2, 3])
def test_ranks(size: int) -> None:
    with rank_threads(size, goldens.DIRECTORY, fill) as worker:
        same(worker.step(*MIXED), worker.step(*IDS))
        same(worker.step(*MIXED), run_step(attention_engine(), *IDS), 1e-4)


def test_a_step_with_them_is_not_recorded() -> None:
    decode = SequenceChunk((5,), 3, (1,), GREEDY)
    assert can_be_recorded((decode,))
    assert not can_be_recorded((decode, by_rows(dataclasses.replace(decode, page_ids=(2,)))))


def there_and_back(plan: StepPlan) -> StepPlan:
    data = plan_to_proto(plan).SerializeToString()
    return plan_from_proto(attention_pb2.StepPlan.FromString(data), plan_payload(plan))


def test_a_plan_with_rows_there_and_back() -> None:
    plan = StepPlan("me", MIXED)
    found = there_and_back(plan)
    assert found.hidden_state is None
    assert plan_payload(plan).shape == (22, D)
    for chunk, expected in zip(found.chunks, MIXED, strict=True):
        assert (chunk.embeds is None) == (expected.embeds is None)
        if expected.embeds is not None:
            assert torch.equal(chunk.embeds, expected.embeds)
        assert dataclasses.replace(chunk, embeds=None) == dataclasses.replace(expected, embeds=None)


@pytest.mark.parametrize(
    ("plan", "is_hidden_state", "count"),
    [(StepPlan("", MIXED), False, 22), (StepPlan("", IDS), True, 42), (StepPlan("", IDS), False, 0)],
)
def test_how_many_rows_a_payload_has(plan: StepPlan, is_hidden_state: bool, count: int) -> None:
    assert num_payload_rows(plan_to_proto(plan), is_hidden_state) == count


@pytest.mark.parametrize("payload", [None, torch.ones(21, D), torch.ones(23, D), torch.ones(22), torch.ones(2, 11, D)])
def test_a_payload_without_the_rows_of_the_chunks_is_refused(payload: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"payload: .* 22 rows"):
        plan_from_proto(plan_to_proto(StepPlan("", MIXED)), payload)


def chunk_with(embeds: torch.Tensor) -> SequenceChunk:
    return SequenceChunk((0, 0, 0), 0, (0,), GREEDY, embeds=embeds)


@pytest.mark.parametrize(
    ("embeds", "field", "words"),
    [
        (torch.ones(4, D), "plan.chunks[0].num_embeds", "is 4, the chunk has 3 tokens"),
        (torch.ones(2, D + 1), "payload", f"float32 [2, {D + 1}]"),
        (torch.ones(2, D, dtype=torch.bfloat16), "payload", "must be float32"),
    ],
)
def test_what_a_worker_refuses(embeds: torch.Tensor, field: str, words: str) -> None:
    engine = attention_engine()
    with pytest.raises(InvalidRequest) as caught:
        run_step(engine, chunk_with(embeds))
    assert caught.value.field == field
    assert words in caught.value.message


def test_a_stage_that_does_not_begin_the_model_has_no_use_for_them() -> None:
    _, last = stages((0, 1, 3))
    with pytest.raises(InvalidRequest, match=r"num_embeds: is 3, layer 1 begins with no tokens"):
        last.begin(StepPlan(last.incarnation, (chunk_with(torch.ones(3, D)),), torch.ones(3, D)))
