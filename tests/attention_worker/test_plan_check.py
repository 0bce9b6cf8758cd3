"""What an attention worker refuses, by which name, and that a refusal leaves the cache as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from attention_worker import plan_check
from attention_worker.engine import AttentionEngine
from attention_worker.plan_check import PlanCheck
from grokmoe.errors import FailedPrecondition, GrokmoeError, InvalidRequest
from grokmoe.step_plan import GREEDY, Penalties, SequenceChunk, StepPlan, TokenSampling, TokenScoring, pack_ids
from tests.attention_worker.tiny_engine import CONFIG, attention_engine, run_step

PAGE_SIZE, NUM_PAGES, MAX_TOKENS = 8, 70, 20
INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module")
def engine() -> AttentionEngine:
    engine = attention_engine(num_pages=NUM_PAGES, page_size=PAGE_SIZE, max_step_tokens=MAX_TOKENS)
    run_step(engine, SequenceChunk(tuple(range(20)), 0, (3, 1, 5), GREEDY))
    return engine


def chunk(tokens: Any = (1, 2, 3), start: int = 0, pages: Any = (0,), **options: Any) -> SequenceChunk:
    return SequenceChunk(tuple(tokens), start, tuple(pages), **options)


def sampled(**how: Any) -> SequenceChunk:
    return chunk(sampling=TokenSampling(**how))


def penalized(**how: Any) -> SequenceChunk:
    return sampled(penalties=Penalties(**how))


def scored(first: int = 0, targets: Any = (1,), num_top: int = 0, page: int = 0) -> SequenceChunk:
    return chunk(pages=(page,), scoring=TokenScoring(first, targets, num_top))


REFUSED: list[tuple[list[SequenceChunk], str, tuple[str, ...]]] = [
    ([], "plan.chunks", ("empty",)),
    ([chunk(range(21), 0, (0, 1, 2))], "plan.chunks", ("21", "20")),
    ([chunk(range(11), 0, (0, 1)), chunk(range(10), 0, (2, 3))], "plan.chunks", ("21", "20")),
    ([chunk(()), chunk()], "plan.chunks[0].token_ids", ("empty",)),
    ([chunk(), chunk((1, 512, 3), pages=(1,))], "plan.chunks[1].token_ids", ("512", "vocabulary size 512")),
    ([chunk((-1,))], "plan.chunks[0].token_ids", ("vocabulary",)),
    ([chunk(start=-1)], "plan.chunks[0].start", ("-1", "512")),
    ([chunk(start=510, pages=range(65))], "plan.chunks[0].start", ("510", "512")),
    ([chunk(start=2**32 - 1)], "plan.chunks[0].start", ("4294967295", "512")),
    ([chunk(pages=())], "plan.chunks[0].page_ids", ("has 0", "need 1")),
    ([chunk(start=6)], "plan.chunks[0].page_ids", ("has 1", "9 positions need 2")),
    ([chunk(pages=(0, 1))], "plan.chunks[0].page_ids", ("has 2", "need 1")),
    ([chunk(pages=(NUM_PAGES,))], "plan.chunks[0].page_ids", (str(NUM_PAGES), "below")),
    ([chunk(pages=(-1,))], "plan.chunks[0].page_ids", ("below",)),
    ([chunk(start=6, pages=(4, 4))], "plan.chunks[0].page_ids", ("twice",)),
    ([chunk(pages=(4,)), chunk(pages=(4,))], "plan.chunks[1].page_ids", ("page 4", "earlier chunk")),
    (
        [chunk(start=8, pages=(4, 6)), chunk(start=7, pages=(6, 7))],
        "plan.chunks[1].page_ids",
        ("page 6", "earlier chunk"),
    ),
    ([sampled(temperature=-1.0)], "plan.chunks[0].sampling.temperature", ("-1.0",)),
    ([sampled(temperature=float("nan"))], "plan.chunks[0].sampling.temperature", ("nan",)),
    ([sampled(temperature=float("inf"))], "plan.chunks[0].sampling.temperature", ("inf",)),
    ([sampled(top_p=0.0)], "plan.chunks[0].sampling.top_p", ("0.0", "(0, 1]")),
    ([sampled(top_p=1.1)], "plan.chunks[0].sampling.top_p", ("1.1",)),
    ([sampled(top_p=float("nan"))], "plan.chunks[0].sampling.top_p", ("nan",)),
    ([sampled(top_k=-1)], "plan.chunks[0].sampling.top_k", ("-1",)),
    ([sampled(min_p=-0.1)], "plan.chunks[0].sampling.min_p", ("-0.1", "[0, 1]")),
    ([sampled(min_p=1.1)], "plan.chunks[0].sampling.min_p", ("1.1",)),
    ([sampled(min_p=NAN)], "plan.chunks[0].sampling.min_p", ("nan",)),
    ([sampled(bias_ids=(1, 512), bias=(1.0, 1.0))], "plan.chunks[0].sampling.bias_ids", ("512", "vocabulary")),
    ([sampled(bias_ids=(-1,), bias=(1.0,))], "plan.chunks[0].sampling.bias_ids", ("-1", "vocabulary")),
    ([sampled(bias_ids=(3, 4, 3), bias=(1.0,) * 3)], "plan.chunks[0].sampling.bias_ids", ("twice",)),
    ([sampled(bias_ids=(3, 4), bias=(1.0,))], "plan.chunks[0].sampling.bias", ("1 values for 2",)),
    ([sampled(bias=(1.0,))], "plan.chunks[0].sampling.bias", ("1 values for 0",)),
    ([sampled(bias_ids=(3, 4), bias=(-INF, INF))], "plan.chunks[0].sampling.bias", ("inf",)),
    ([sampled(bias_ids=(3, 4), bias=(0.0, NAN))], "plan.chunks[0].sampling.bias", ("nan",)),
    ([penalized(repetition=0.0)], "plan.chunks[0].sampling.penalties.repetition", ("0.0", "above 0")),
    ([penalized(repetition=-1.0)], "plan.chunks[0].sampling.penalties.repetition", ("-1.0",)),
    ([penalized(repetition=INF)], "plan.chunks[0].sampling.penalties.repetition", ("inf",)),
    ([penalized(repetition=NAN)], "plan.chunks[0].sampling.penalties.repetition", ("nan",)),
    ([penalized(frequency=INF)], "plan.chunks[0].sampling.penalties.frequency", ("inf",)),
    ([penalized(presence=NAN)], "plan.chunks[0].sampling.penalties.presence", ("nan",)),
    ([penalized(prompt_ids=b"12345")], "plan.chunks[0].sampling.penalties.prompt_ids", ("5 bytes", "4")),
    ([penalized(output_ids=pack_ids([1, 512]))], "plan.chunks[0].sampling.penalties.output_ids", ("512", "below")),
    ([sampled(allowed=bytes(63))], "plan.chunks[0].sampling.allowed", ("63", "512", "64")),
    ([sampled(allowed=bytes(65))], "plan.chunks[0].sampling.allowed", ("65", "64")),
    ([sampled(num_logprobs=-2)], "plan.chunks[0].sampling.num_logprobs", ("-2", "-1", "512")),
    ([sampled(num_logprobs=513)], "plan.chunks[0].sampling.num_logprobs", ("513",)),
    ([chunk(), scored(first=3, page=1)], "plan.chunks[1].scoring.first", ("3", "3 tokens")),
    ([scored(first=-1)], "plan.chunks[0].scoring.first", ("-1",)),
    ([scored(targets=())], "plan.chunks[0].scoring.target_ids", ("has 0", "1 to 3")),
    ([scored(first=1, targets=(1, 2, 3))], "plan.chunks[0].scoring.target_ids", ("has 3", "1 to 2")),
    ([scored(targets=(1, 512))], "plan.chunks[0].scoring.target_ids", ("512", "below")),
    ([scored(targets=(1, -5))], "plan.chunks[0].scoring.target_ids", ("-5",)),
    ([scored(num_top=-2)], "plan.chunks[0].scoring.num_top", ("-2",)),
    ([scored(num_top=513)], "plan.chunks[0].scoring.num_top", ("513", "512")),
]


@pytest.mark.parametrize(("chunks", "field", "words"), REFUSED)
def test_a_refusal_names_the_field_and_changes_nothing(
    engine: AttentionEngine, chunks: list[SequenceChunk], field: str, words: tuple[str, ...]
) -> None:
    cache = engine.cache
    before = [pages.clone() for pages in (*cache.k_KPSd, *cache.v_KPSd)]
    with pytest.raises(InvalidRequest) as caught:
        engine.begin(StepPlan(engine.incarnation, tuple(chunks)))
    assert caught.value.field == field
    for word in words:
        assert word in caught.value.description
    assert all(torch.equal(*pair) for pair in zip(before, (*cache.k_KPSd, *cache.v_KPSd), strict=True))


@pytest.mark.parametrize("incarnation", ["", "another"])
def test_another_incarnation_is_a_failed_precondition(engine: AttentionEngine, incarnation: str) -> None:
    with pytest.raises(FailedPrecondition, match=engine.incarnation):
        engine.begin(StepPlan(incarnation, (chunk(),)))


ACCEPTED = [
    [chunk(range(20), 0, (2, 1, 0))],
    [chunk((0, 511))],
    [chunk(start=509, pages=range(64))],
    [chunk(start=8, pages=(4, 6)), chunk(start=8, pages=(4, 7))],
    [chunk(start=8, pages=(4, 6)), chunk(start=0, pages=(4,))],
    [sampled(temperature=0.0), chunk(pages=(1,), sampling=TokenSampling(9e9, 10**6, 1e-9, 2**64 - 1))],
    [sampled(min_p=1.0, bias_ids=(0, 511), bias=(-INF, 1e30), allowed=bytes(64), num_logprobs=-1)],
    [sampled(num_logprobs=512), scored(first=2, targets=(511,), num_top=512, page=1)],
    [scored(first=1, targets=(1, 2), num_top=-1)],
    [penalized(repetition=1e-9, frequency=-2.0, presence=2.0, prompt_ids=pack_ids([0, 511, 511]))],
]


@pytest.mark.parametrize("chunks", ACCEPTED)
def test_what_is_in_order_passes(chunks: list[SequenceChunk]) -> None:
    check = PlanCheck(CONFIG, range(CONFIG.num_layers), "me", NUM_PAGES, PAGE_SIZE, MAX_TOKENS)
    check.check(StepPlan("me", tuple(chunks)))
    with pytest.raises(GrokmoeError):
        PlanCheck(
            dataclasses.replace(CONFIG, context_length=1), range(3), "me", NUM_PAGES, PAGE_SIZE, MAX_TOKENS
        ).check(StepPlan("me", tuple(chunks)))


def test_the_most_likely_tokens_of_a_plan_fit_into_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = (scored(targets=(1, 2, 3), num_top=50), chunk(pages=(1,), sampling=TokenSampling(num_logprobs=50)))
    whole = (chunk(pages=(2,), sampling=TokenSampling(num_logprobs=-1)), scored(num_top=-1, page=3))
    check = PlanCheck(CONFIG, range(CONFIG.num_layers), "me", NUM_PAGES, PAGE_SIZE, MAX_TOKENS)
    monkeypatch.setattr(plan_check, "MAX_TOP_BYTES", 8 * 4 * 50)
    check.check(StepPlan("me", (*chunks, *whole)))
    monkeypatch.setattr(plan_check, "MAX_TOP_BYTES", 8 * 4 * 50 - 1)
    with pytest.raises(InvalidRequest, match=r"plan\.chunks: ask for 1600 bytes .* limit is 1599"):
        check.check(StepPlan("me", chunks))
