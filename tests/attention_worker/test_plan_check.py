"""What an attention worker refuses, by which name, and that a refusal leaves the cache as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from attention_worker.engine import AttentionEngine
from attention_worker.plan_check import PlanCheck
from grokmoe.errors import FailedPrecondition, GrokmoeError, InvalidRequest
from grokmoe.step_plan import GREEDY, SequenceChunk, StepPlan, TokenSampling
from tests.attention_worker.tiny_engine import CONFIG, attention_engine, run_step

PAGE_SIZE, NUM_PAGES, MAX_TOKENS = 8, 70, 20


@pytest.fixture(scope="module")
def engine() -> AttentionEngine:
    engine = attention_engine(num_pages=NUM_PAGES, page_size=PAGE_SIZE, max_step_tokens=MAX_TOKENS)
    run_step(engine, SequenceChunk(tuple(range(20)), 0, (3, 1, 5), GREEDY))
    return engine


def chunk(tokens: Any = (1, 2, 3), start: int = 0, pages: Any = (0,), **options: Any) -> SequenceChunk:
    return SequenceChunk(tuple(tokens), start, tuple(pages), **options)


def sampled(**how: Any) -> SequenceChunk:
    return chunk(sampling=TokenSampling(**how))


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
]


@pytest.mark.parametrize(("chunks", "field", "words"), REFUSED)
def test_a_refusal_names_the_field_and_changes_nothing(
    engine: AttentionEngine, chunks: list[SequenceChunk], field: str, words: tuple[str, ...]
) -> None:
    cache = engine._cache
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
]


@pytest.mark.parametrize("chunks", ACCEPTED)
def test_what_is_in_order_passes(chunks: list[SequenceChunk]) -> None:
    check = PlanCheck(CONFIG, "me", NUM_PAGES, PAGE_SIZE, MAX_TOKENS)
    check.check(StepPlan("me", tuple(chunks)))
    with pytest.raises(GrokmoeError):
        PlanCheck(dataclasses.replace(CONFIG, context_length=1), "me", NUM_PAGES, PAGE_SIZE, MAX_TOKENS).check(
            StepPlan("me", tuple(chunks))
        )
