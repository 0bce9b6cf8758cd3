"""The engine's protocol: from hole to hole, wrong outputs, steps dropped half-way, two at a time, logits on request."""

from __future__ import annotations

import pytest
import torch

from attention_worker.engine import MoeInput, num_pages_in
from grokmoe.errors import InvalidRequest
from grokmoe.step_plan import GREEDY, LogitsScope, SequenceChunk, StepResult
from tests import goldens
from tests.attention_worker.tiny_engine import CONFIG, attention_engine, fill, finish, plan, run_step

PROMPT = tuple(goldens.PROMPTS["len33"])
PAGES = (7, 2, 9, 4, 0, 11)


def prefill(**options: object) -> SequenceChunk:
    return SequenceChunk(PROMPT, 0, PAGES[:5], **{"sampling": GREEDY, **options})  # type: ignore[arg-type]


def test_a_step_goes_from_hole_to_hole() -> None:
    engine = attention_engine()
    run = engine.begin(plan(engine, prefill()))
    at, layers = run.advance(None), []
    while isinstance(at, MoeInput):
        layers.append(at.layer)
        assert at.x_TD.shape == (33, CONFIG.hidden_size)
        assert at.x_TD.dtype == torch.float32
        at = run.advance(fill(at))
    assert layers == [0, 1, 2]
    assert at == StepResult((goldens.greedy("seed", "len33")[0],))


@pytest.mark.parametrize("prompt", [*goldens.PROMPTS])
def test_prefill_and_decode_give_the_golden_tokens(prompt: str) -> None:
    engine, token_ids = attention_engine(), list(goldens.PROMPTS[prompt])
    pages = tuple(range(12))
    start = 0
    while len(token_ids) < len(goldens.PROMPTS[prompt]) + 16:
        chunk = SequenceChunk(tuple(token_ids[start:]), start, pages[: -(-len(token_ids) // 8)], GREEDY)
        start = len(token_ids)
        token_ids += run_step(engine, chunk).token_ids
    assert token_ids[len(goldens.PROMPTS[prompt]) :] == goldens.greedy("seed", prompt)


@pytest.mark.parametrize("cuts", [(33,), (8, 33), (5, 6, 20, 33)])
def test_a_prompt_in_chunks_has_the_golden_logits(cuts: tuple[int, ...]) -> None:
    engine, start, found = attention_engine(), 0, []
    for end in cuts:
        chunk = SequenceChunk(PROMPT[start:end], start, PAGES[: -(-end // 8)], None, LogitsScope.ALL)
        result = run_step(engine, chunk)
        assert result.token_ids == ()
        found.append(result.logits)
        start = end
    assert (torch.cat(found) - goldens.logits("seed", "len33")).abs().max() < 1e-4


def test_logits_are_returned_as_asked_for() -> None:
    engine, reference_TV = attention_engine(), goldens.logits("seed", "len33")
    scopes = [LogitsScope.NONE, LogitsScope.ALL, LogitsScope.NONE, LogitsScope.ALL]
    sampled = [GREEDY, GREEDY, None, None]
    chunks = [
        SequenceChunk(PROMPT[: 5 + index], 0, (index,), how, scope)
        for index, (scope, how) in enumerate(zip(scopes, sampled, strict=True))
    ]
    result = run_step(engine, *chunks)
    expected = [reference_TV[:6], reference_TV[:8]]
    assert result.logits.shape == (6 + 8, CONFIG.vocab_size)
    assert (result.logits - torch.cat(expected)).abs().max() < 1e-4
    assert list(result.token_ids) == [int(reference_TV[length - 1].argmax()) for length in (5, 6)]


def test_nothing_asked_for_nothing_returned() -> None:
    engine = attention_engine()
    assert run_step(engine, prefill(sampling=None)) == StepResult((), None)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x_TD: x_TD[:-1],
        lambda x_TD: x_TD[:, :-1],
        lambda x_TD: x_TD.bfloat16(),
        lambda x_TD: x_TD[None],
        lambda x_TD: x_TD.new_empty(0),
    ],
)
def test_a_wrong_output_is_refused_and_the_step_goes_on(wrong: object) -> None:
    engine = attention_engine()
    run = engine.begin(plan(engine, prefill()))
    at = run.advance(None)
    while isinstance(at, MoeInput):
        with pytest.raises(InvalidRequest) as caught:
            run.advance(wrong(at.x_TD))  # type: ignore[operator]
        assert caught.value.field == "payload"
        at = run.advance(fill(at))
    assert at.token_ids == (goldens.greedy("seed", "len33")[0],)


def test_an_output_before_the_first_hole_is_refused() -> None:
    engine = attention_engine()
    run = engine.begin(plan(engine, prefill()))
    with pytest.raises(InvalidRequest, match="payload"):
        run.advance(torch.zeros(33, CONFIG.hidden_size))
    assert finish(run).token_ids == (goldens.greedy("seed", "len33")[0],)


@pytest.mark.parametrize("num_holes", [0, 1, 3])
def test_a_step_that_is_dropped_leaves_the_engine_usable(num_holes: int) -> None:
    engine = attention_engine()
    run = engine.begin(plan(engine, prefill()))
    at = run.advance(None) if num_holes else None
    for _ in range(num_holes - 1):
        assert isinstance(at, MoeInput)
        at = run.advance(fill(at))
    run.close()
    run.close()
    assert run_step(engine, prefill()).token_ids == (goldens.greedy("seed", "len33")[0],)


def test_a_plan_that_was_begun_and_never_run_changes_nothing() -> None:
    engine = attention_engine()
    engine.begin(plan(engine, prefill())).close()
    assert not any(pages.any() for pages in (*engine.cache.k_KPSd, *engine.cache.v_KPSd))


def test_two_steps_side_by_side() -> None:
    engine = attention_engine()
    other = tuple(goldens.PROMPTS["len7"])
    runs = [
        engine.begin(plan(engine, prefill())),
        engine.begin(plan(engine, SequenceChunk(other, 0, (20,), GREEDY))),
    ]
    ats = [run.advance(None) for run in runs]
    for _ in range(CONFIG.num_layers):
        for index, run in enumerate(runs):
            at = ats[index]
            assert isinstance(at, MoeInput)
            ats[index] = run.advance(fill(at))
    assert ats == [StepResult((goldens.greedy("seed", name)[0],)) for name in ("len33", "len7")]


def test_pages_can_be_shared_and_reused() -> None:
    engine = attention_engine()
    run_step(engine, SequenceChunk(PROMPT[:16], 0, PAGES[:2]))
    one = SequenceChunk(PROMPT[16:], 16, PAGES[:5], GREEDY)
    two = SequenceChunk(PROMPT[16:], 16, (*PAGES[:2], 20, 21, 22), GREEDY)
    assert run_step(engine, one, two).token_ids == (goldens.greedy("seed", "len33")[0],) * 2
    other = SequenceChunk(tuple(goldens.PROMPTS["len7"]), 0, PAGES[:1], GREEDY)
    assert run_step(engine, other).token_ids == (goldens.greedy("seed", "len7")[0],)


def test_every_start_is_another_incarnation() -> None:
    assert attention_engine().incarnation != attention_engine().incarnation


def test_the_pages_that_fit() -> None:
    layer_bytes = 2 * CONFIG.kv_size * 16 * 4
    assert num_pages_in(CONFIG, 3, torch.float32, 16, 300 * layer_bytes / 2**30) == 100
    assert num_pages_in(CONFIG, 1, torch.float32, 16, 300 * layer_bytes / 2**30) == 300, "a stage pays for its own"
    assert num_pages_in(CONFIG, 3, torch.float32, 16, 0.0) == 512 // 16, "one sequence of full context at least"
