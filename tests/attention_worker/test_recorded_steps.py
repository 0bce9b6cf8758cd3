"""Decode steps as programs: the bits of the loops one by one, whatever changes from step to step."""

from __future__ import annotations

import dataclasses
import functools
import random

import pytest
import torch

from attention_worker import recorded_steps
from attention_worker.engine import AttentionEngine, AttentionEngineSettings, StepRun
from attention_worker.weights import load_weights
from expert_worker import weights as expert_weights
from expert_worker.engine import ExpertEngine
from expert_worker.experts import ExpertSet
from grokmoe import tensor_names
from grokmoe.checkpoint import Checkpoint
from grokmoe.native import has_dots
from grokmoe.step_plan import GREEDY, LogitsScope, SequenceChunk, StepPlan, StepResult, TokenSampling, TokenScoring
from grokmoe.telemetry import AttentionMetrics, ExpertMetrics, new_registry
from router.legs import Legs
from router.moe import Gates, LocalMoe, RowCounter
from router.transport.local import drive
from tests import goldens
from tests.attention_worker.tiny_engine import CONFIG, device

pytestmark = pytest.mark.skipif(not has_dots(), reason="products that can be recorded need AVX-512 BF16")

DTYPE, PAGE_SIZE, NUM_PAGES = torch.bfloat16, 8, 64


class Setup:
    """An engine and its experts in bfloat16. counter: rows per layer and expert."""

    def __init__(self, expert_dtype: str = "", enforce_eager: bool = False) -> None:
        with Checkpoint.open(goldens.DIRECTORY) as checkpoint:
            weights = load_weights(checkpoint, DTYPE, torch.device("cpu"))
            held = {layer: tuple(range(CONFIG.num_experts)) for layer in range(CONFIG.num_layers)}
            experts = ExpertSet(
                CONFIG, held, DTYPE, torch.device("cpu"), **({"expert_dtype": expert_dtype} if expert_dtype else {})
            )
            expert_weights.load(experts, checkpoint)
            gates = [checkpoint.read(tensor_names.gate(layer), torch.float32) for layer in range(CONFIG.num_layers)]
        sizes = AttentionEngineSettings(NUM_PAGES, PAGE_SIZE, 512, enforce_eager)
        self.engine = AttentionEngine(CONFIG, weights, sizes, AttentionMetrics(new_registry()), device())
        self.registry, self.counter = new_registry(), RowCounter(CONFIG)
        on_board = ExpertEngine(experts, ExpertMetrics(self.registry), device())
        assert on_board.can_be_recorded

        def call(layer: int, ids: tuple[int, ...], counts: tuple[int, ...], rows_ND: torch.Tensor) -> torch.Tensor:
            return on_board.forward(layer, ids, counts, rows_ND).rows_ND

        self.new_moe = functools.partial(LocalMoe, CONFIG, Gates.from_weights(gates), call, self.counter)
        self.record = on_board.record

    def run(self, *chunks: SequenceChunk) -> tuple[StepResult, Legs]:
        """One step, as the fused process drives it."""
        legs = Legs()
        run = self.engine.begin(StepPlan(self.engine.incarnation, chunks))
        return drive(run, self.new_moe(legs, record_experts=self.record), legs), legs

    @property
    def programs(self) -> list[int]:
        """Sizes for which there are programs."""
        found = self.engine.recorded
        return [] if found is None else found.sizes


class Sequences:
    """Some sequences that decode, with pages of their own."""

    def __init__(self, count: int, seed: int = 0, sampling: TokenSampling = GREEDY) -> None:
        draw = random.Random(seed)
        pages = draw.sample(range(NUM_PAGES), NUM_PAGES)
        self.ids = [[draw.randrange(CONFIG.vocab_size) for _ in range(draw.randint(1, 20))] for _ in range(count)]
        each = NUM_PAGES // max(count, 4)
        self._pages = [tuple(pages[number * each : (number + 1) * each]) for number in range(count)]
        self.sampling = sampling

    def _chunk(self, number: int, start: int) -> SequenceChunk:
        ids = self.ids[number]
        pages = self._pages[number][: -(-len(ids) // PAGE_SIZE)]
        return SequenceChunk(tuple(ids[start:]), start, pages, self.sampling)

    def prefill(self, setup: Setup) -> None:
        result, _ = setup.run(*(self._chunk(number, 0) for number in range(len(self.ids))))
        self._take(result)

    def chunks(self) -> list[SequenceChunk]:
        return [self._chunk(number, len(ids) - 1) for number, ids in enumerate(self.ids)]

    def decode(self, setup: Setup) -> StepResult:
        result, _ = setup.run(*self.chunks())
        self._take(result)
        return result

    def _take(self, result: StepResult) -> None:
        for ids, token in zip(self.ids, result.token_ids, strict=True):
            ids.append(token)


def decoded(setup: Setup, count: int, num_steps: int, sampling: TokenSampling = GREEDY) -> list[list[int]]:
    sequences = Sequences(count, sampling=sampling)
    sequences.prefill(setup)
    for _ in range(num_steps):
        sequences.decode(setup)
    return sequences.ids


DRAWN = TokenSampling(temperature=1.5, seed=3)


@pytest.mark.parametrize("expert_dtype", ["", "int8"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_program_draws_the_tokens_of_its_loops(count: int, expert_dtype: str) -> None:
    recorded, plain = Setup(expert_dtype), Setup(expert_dtype, enforce_eager=True)
    assert decoded(recorded, count, 9, DRAWN) == decoded(plain, count, 9, DRAWN)
    assert recorded.programs == [count]
    assert not plain.programs
    assert recorded.counter.rows_LE == plain.counter.rows_LE


def test_pages_hold_what_the_loops_would_have_written() -> None:
    recorded, plain = Setup(), Setup(enforce_eager=True)
    for setup in (recorded, plain):
        decoded(setup, 3, 12)
    for kind in ("k_KPSd", "v_KPSd"):
        for ours, theirs in zip(getattr(recorded.engine.cache, kind), getattr(plain.engine.cache, kind), strict=True):
            assert torch.equal(ours, theirs)


def test_sizes_come_and_go_and_a_sequence_may_be_anyone() -> None:
    recorded, plain = Setup(), Setup(enforce_eager=True)
    found: list[list[list[int]]] = []
    for setup in (recorded, plain):
        few, many = Sequences(2, seed=1), Sequences(4, seed=2)
        texts = []
        for _ in range(3):  # the same pages belong to one set of sequences, then to the other
            for sequences in (few, many):
                sequences.prefill(setup)
                for _ in range(4):
                    sequences.decode(setup)
                texts.append([list(ids) for ids in sequences.ids])
        found.append(texts)
    assert found[0] == found[1]
    assert recorded.programs == [2, 4]


def test_the_first_two_steps_of_a_size_are_plain() -> None:
    setup = Setup()
    sequences = Sequences(2)
    sequences.prefill(setup)
    sequences.decode(setup)
    assert not setup.programs
    sequences.decode(setup)
    assert setup.programs == [2]


@pytest.mark.parametrize(
    "changes",
    [
        {"logits": LogitsScope.ALL},
        {"scoring": TokenScoring(0, (5,))},
        {"sampling": None},
        {"sampling": TokenSampling(num_logprobs=-1)},
    ],
)
def test_what_is_not_recorded(changes: dict[str, object]) -> None:
    setup = Setup()
    sequences = Sequences(2)
    sequences.prefill(setup)
    for _ in range(4):
        setup.run(*(dataclasses.replace(chunk, **changes) for chunk in sequences.chunks()))  # type: ignore[arg-type]
    assert not setup.programs


def test_prompts_are_not_recorded() -> None:
    setup = Setup()
    for _ in range(4):
        Sequences(1).prefill(setup)
    assert not setup.programs


def test_log_probabilities_of_a_program() -> None:
    wanted = TokenSampling(num_logprobs=3)
    tables = []
    for setup in (Setup(), Setup(enforce_eager=True)):
        sequences = Sequences(3, sampling=wanted)
        sequences.prefill(setup)
        tables.append([sequences.decode(setup).logprobs for _ in range(5)])
    assert tables[0] == tables[1]


def test_legs_of_a_program_are_all_there() -> None:
    setup = Setup()
    sequences = Sequences(2)
    sequences.prefill(setup)
    for _ in range(3):
        _, legs = setup.run(*sequences.chunks())
    for leg in ("embed", "norm", "qkv", "attention", "out", "head", "sample", "gate", "dispatch", "expert", "combine"):
        assert legs.seconds[leg] > 0, leg
    assert legs.seconds["worker"] >= 0


def test_rows_of_experts_are_counted_once() -> None:
    setup = Setup()
    decoded(setup, 3, 6)
    rows = sum(len(ids) - 1 for ids in Sequences(3).ids) + 3 + 6 * 3  # prompts, and every decoded token
    assert [sum(row) for row in setup.counter.rows_LE] == [rows * CONFIG.experts_per_token] * CONFIG.num_layers
    counted = sum(
        sample.value
        for metric in setup.registry.collect()
        for sample in metric.samples
        if sample.name == "grokmoe_expert_worker_rows_total"
    )
    assert counted == rows * CONFIG.experts_per_token * CONFIG.num_layers


def test_a_program_that_computes_something_else_is_never_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    setup = Setup()
    true = setup.record

    def wrong(layer: int, counts_E: torch.Tensor, rows_ND: torch.Tensor) -> torch.Tensor:
        true(layer, counts_E, rows_ND)
        return rows_ND

    setup.record = wrong
    expected = decoded(Setup(enforce_eager=True), 2, 6)
    assert decoded(setup, 2, 6) == expected
    assert not setup.programs
    assert "other logits" in caplog.text
    assert caplog.text.count("other logits") == 1


def test_nan_is_caught() -> None:
    setup = Setup()
    sequences = Sequences(2)
    sequences.prefill(setup)
    for _ in range(3):
        sequences.decode(setup)
    assert setup.programs == [2]
    page = sequences.chunks()[1].page_ids[0]
    setup.engine.cache.v_KPSd[0][:, page] = torch.nan
    result, _ = setup.run(*sequences.chunks())
    assert result.faulty_chunks == (1,)


def bytes_of(count: int) -> int:
    setup = Setup()
    decoded(setup, count, 3)
    assert setup.engine.recorded is not None
    return setup.engine.recorded.num_bytes


def test_programs_make_way_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_steps, "MOST_BYTES", bytes_of(1) + bytes_of(2) - 1)
    setup = Setup()
    decoded(setup, 2, 3)
    assert setup.programs == [2]
    decoded(setup, 1, 3)
    assert setup.programs == [1]


def test_a_program_larger_than_all_that_may_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_steps, "MOST_BYTES", bytes_of(4) - 1)
    setup = Setup()
    decoded(setup, 4, 5)
    assert not setup.programs


def test_runs_are_plain_where_products_are_not_loops() -> None:
    with Checkpoint.open(goldens.DIRECTORY) as checkpoint:
        weights = load_weights(checkpoint, torch.float32, torch.device("cpu"))
    engine = AttentionEngine(
        CONFIG, weights, AttentionEngineSettings(8, 8, 64), AttentionMetrics(new_registry()), device()
    )
    assert engine.recorded is None


def test_a_run_without_a_program_can_be_advanced() -> None:
    setup = Setup()
    sequences = Sequences(1)
    sequences.prefill(setup)
    run: StepRun = setup.engine.begin(StepPlan(setup.engine.incarnation, tuple(sequences.chunks())))
    moe = setup.new_moe(Legs(), record_experts=setup.record)
    assert run.replay(moe.record) is None
    at = run.advance(None)
    while not isinstance(at, StepResult):
        at = run.advance(moe.fill_now(at.layer, at.x_TD))
    assert len(at.token_ids) == 1
