"""Workers that hold some of the layers: one after the other they compute what one with all of them does, to the bit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from attention_worker.config import AttentionWorkerSettings, parse_layers
from attention_worker.engine import AttentionEngine, MoeInput
from attention_worker.loading import load_engine
from attention_worker.weights import load_weights
from grokmoe.checkpoint import Checkpoint
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import ConfigError, InvalidRequest
from grokmoe.step_plan import GREEDY, LogitsScope, SequenceChunk, StepPlan, StepResult, TokenScoring
from grokmoe.telemetry import AttentionMetrics, new_registry
from tests import goldens
from tests.attention_worker.tiny_engine import CONFIG, attention_engine, fill, run_step

PROMPT = tuple(goldens.PROMPTS["len33"])
SPLITS = [(0, 1, 2, 3), (0, 1, 3), (0, 2, 3)]
D = CONFIG.hidden_size


def stages(cuts: Sequence[int]) -> list[AttentionEngine]:
    return [attention_engine(held=range(begin, end)) for begin, end in itertools.pairwise(cuts)]


def run_stages(engines: Sequence[AttentionEngine], *chunks: SequenceChunk) -> StepResult:
    """One step through all of them, each with its own incarnation."""
    hidden_TD = None
    for engine in engines:
        run = engine.begin(StepPlan(engine.incarnation, chunks, hidden_TD))
        at, layers = run.advance(None), []
        while isinstance(at, MoeInput):
            layers.append(at.layer)
            at = run.advance(fill(at))
        assert layers == list(engine.held)
        hidden_TD = at.hidden_state
    return at


@pytest.mark.parametrize("cuts", SPLITS)
def test_prefill_in_chunks_and_decode_give_the_golden_tokens(cuts: tuple[int, ...]) -> None:
    engines, token_ids, start = stages(cuts), list(PROMPT), 0
    while len(token_ids) < len(PROMPT) + 16:
        end = min(len(token_ids), start + 12)
        sampling = GREEDY if end == len(token_ids) else None
        chunk = SequenceChunk(tuple(token_ids[start:end]), start, tuple(range(-(-end // 8))), sampling)
        token_ids += run_stages(engines, chunk).token_ids
        start = end
    assert token_ids[len(PROMPT) :] == goldens.greedy("seed", "len33")


@pytest.mark.parametrize("cuts", SPLITS)
def test_logits_and_tables_are_those_of_one_worker(cuts: tuple[int, ...]) -> None:
    chunks = (
        SequenceChunk(PROMPT, 0, (7, 2, 9, 4, 0), GREEDY, LogitsScope.ALL),
        SequenceChunk(PROMPT[:7], 0, (1,), None, LogitsScope.NONE, TokenScoring(2, (5, 6), 3)),
        SequenceChunk(PROMPT[:3], 0, (3,)),
    )
    whole, found = run_step(attention_engine(), *chunks), run_stages(stages(cuts), *chunks)
    assert torch.equal(found.logits, whole.logits), "the residual loses nothing on its way"
    assert (found.token_ids, found.logprobs) == (whole.token_ids, whole.logprobs)
    assert (whole.logits[:33] - goldens.logits("seed", "len33")).abs().max() < 1e-4


def test_a_stage_that_is_not_the_last_draws_nothing() -> None:
    first, _ = stages((0, 1, 3))
    scored = SequenceChunk(PROMPT[:7], 0, (1,), GREEDY, LogitsScope.ALL, TokenScoring(0, (5,), 1))
    result = run_stages([first], scored)
    assert (result.token_ids, result.logits, result.logprobs, result.faulty_chunks) == ((), None, (), ())
    assert (result.hidden_state.shape, result.hidden_state.dtype) == ((7, D), torch.float32)


def test_the_hidden_state_that_came_in_is_left_as_it_was() -> None:
    """It may be the memory of a message."""
    first, last = stages((0, 2, 3))
    chunk = SequenceChunk(PROMPT[:7], 0, (1,), GREEDY)
    hidden_TD = run_stages([first], chunk).hidden_state
    before = hidden_TD.clone()
    run = last.begin(StepPlan(last.incarnation, (chunk,), hidden_TD))
    at = run.advance(None)
    assert isinstance(at, MoeInput)
    run.advance(fill(at))
    assert torch.equal(hidden_TD, before)


@pytest.mark.parametrize(
    ("held", "hidden_TD", "words"),
    [
        (range(3), torch.zeros(7, D), "layer 0 begins with tokens"),
        (range(1, 3), None, "is missing: layer 1 goes on"),
        (range(1, 3), torch.zeros(6, D), rf"\[6, {D}\], must be float32 \[7, {D}\]"),
        (range(1, 3), torch.zeros(7, D - 1), f"{D - 1}"),
        (range(1, 3), torch.zeros(7 * D), "must be float32"),
        (range(1, 3), torch.zeros(7, D, dtype=torch.bfloat16), "is torch.bfloat16"),
    ],
)
def test_hidden_states_that_are_refused(held: range, hidden_TD: Any, words: str) -> None:
    engine = attention_engine(held=held)
    with pytest.raises(InvalidRequest, match=words) as refusal:
        engine.begin(StepPlan(engine.incarnation, (SequenceChunk(PROMPT[:7], 0, (1,), GREEDY),), hidden_TD))
    assert refusal.value.field == "payload"


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at_layer", [0, 1])
def test_what_is_not_finite_is_named_by_every_stage_from_there_on(poison: float, at_layer: int) -> None:
    """Also of a chunk that draws nothing; its neighbours are as without it."""
    chunks = tuple(SequenceChunk(PROMPT[:7], 0, (page,), how) for page, how in ((1, GREEDY), (2, None), (3, GREEDY)))
    clean, hidden_TD, named = run_step(attention_engine(), chunks[0]), None, []
    for engine in stages((0, 1, 2, 3)):
        run = engine.begin(StepPlan(engine.incarnation, chunks, hidden_TD))
        at = run.advance(None)
        assert isinstance(at, MoeInput)
        out_TD = fill(at)
        if at.layer == at_layer:
            out_TD[9, 5] = poison
        at = run.advance(out_TD)
        assert isinstance(at, StepResult)
        hidden_TD = at.hidden_state
        named.append(at.faulty_chunks)
    assert named == [()] * at_layer + [(1,)] * (3 - at_layer)
    assert at.token_ids == clean.token_ids * 2


def test_a_stage_holds_what_is_its_own() -> None:
    first, middle, last = stages((0, 1, 2, 3))
    assert [engine.held for engine in (first, middle, last)] == [range(1), range(1, 2), range(2, 3)]
    whole = attention_engine()
    # Pages of its layers only.
    assert first.metrics.kv_bytes._value.get() * 3 == whole.metrics.kv_bytes._value.get()
    with Checkpoint.open(goldens.DIRECTORY) as checkpoint:
        begin, inner, end = (
            load_weights(checkpoint, torch.float32, torch.device("cpu"), held=range(layer, layer + 1))
            for layer in range(3)
        )
    assert [each.embedding_VD is not None for each in (begin, inner, end)] == [True, False, False]
    assert [each.head is not None for each in (begin, inner, end)] == [False, False, True]
    assert [each.final_norm_D is not None for each in (begin, inner, end)] == [False, False, True]


def test_a_stage_from_settings() -> None:
    """It warms up without anything before it, and its memory goes to its own layers."""
    devices = [DeviceThread() for _ in range(2)]
    settings = AttentionWorkerSettings(model=str(goldens.DIRECTORY), dtype="float32", kv_gib=0.01, threads=1)
    whole, stage = (
        load_engine(dataclasses.replace(settings, layers=layers), AttentionMetrics(new_registry()), device)
        for layers, device in zip(("all", "2"), devices, strict=True)
    )
    try:
        assert stage.held == range(2, 3)
        assert stage.settings.num_pages // 3 == whole.settings.num_pages
    finally:
        for device in devices:
            device.stop()


@pytest.mark.parametrize(
    ("spec", "held"), [("all", range(8)), ("0-7", range(8)), ("3", range(3, 4)), (" 2-4 ", range(2, 5))]
)
def test_specifications_of_layers(spec: str, held: range) -> None:
    assert parse_layers(spec, 8) == held


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "no layer number"),
        ("0-3,4", "no layer number"),
        ("-3", "no layer number"),
        ("٣", "no layer number"),
        ("4-3", "is empty"),
        ("0-8", "there is no 8"),
        ("9999999999", "no layer number"),
    ],
)
def test_specifications_that_are_refused(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_layers(spec, 8)
