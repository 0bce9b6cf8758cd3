"""Steps with adapters: PEFT's merged weights, many adapters in one step, added tokens, loading while steps run."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
import torch

from attention_worker.config import AttentionWorkerSettings
from attention_worker.engine import AttentionEngine, MoeInput
from attention_worker.loading import load_engine
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import (
    CheckpointError,
    ConfigError,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Reason,
    ResourceExhausted,
)
from grokmoe.step_plan import GREEDY, LogitsScope, SequenceChunk, StepPlan, StepResult, TokenSampling, TokenScoring
from grokmoe.telemetry import AttentionMetrics, new_registry
from tests import goldens, lora_adapters
from tests.attention_worker.tiny_engine import adapter_store, attention_engine, fill, finish, plan, run_step

NAMED = {name: lora_adapters.FOLDER / name for name in lora_adapters.NAMES}
PAGES = 6
"""Of one sequence."""


@pytest.fixture(scope="module")
def engine() -> AttentionEngine:
    return attention_engine(adapters=adapter_store(NAMED))


def id_of(engine: AttentionEngine, name: str) -> str:
    assert engine.adapters is not None
    return next((info.id for info in engine.adapters.loaded if info.name == name), "")


def chunk(engine: AttentionEngine, name: str, place: int, begin: int = 0, end: int = 33) -> SequenceChunk:
    """Part of an adapter's prompt, or of the model's own for "". place: which pages it has."""
    prompt = lora_adapters.prompt(name) if name else goldens.PROMPTS["len33"]
    pages = tuple(range(place * PAGES, place * PAGES + -(-end // 8)))
    sampling = GREEDY if end == 33 else None
    return SequenceChunk(tuple(prompt[begin:end]), begin, pages, sampling, LogitsScope.ALL, None, id_of(engine, name))


@pytest.mark.parametrize("name", lora_adapters.NAMES)
def test_merged_weights_say_the_same(engine: AttentionEngine, name: str) -> None:
    """Logits of a prompt in three chunks, then all the tokens, one by one."""
    parts = [run_step(engine, chunk(engine, name, 0, *span)) for span in ((0, 1), (1, 20), (20, 33))]
    logits = torch.cat([part.logits for part in parts])
    assert (logits - lora_adapters.logits(name)).abs().max() < 1e-4
    tokens = [*parts[-1].token_ids]
    while len(tokens) < 16:
        start = 32 + len(tokens)
        step = SequenceChunk((tokens[-1],), start, tuple(range(start // 8 + 1)), GREEDY, adapter=id_of(engine, name))
        tokens += run_step(engine, step).token_ids
    assert tokens == lora_adapters.greedy(name)


def test_the_adapters_change_what_is_said() -> None:
    """So that the test above could fail."""
    base = goldens.logits("seed", "len33")[:-1]
    for name in lora_adapters.NAMES:
        assert (lora_adapters.logits(name)[:-1, :512] - base).abs().max() > 1


def logits_of(result: StepResult, chunks: list[SequenceChunk]) -> list[torch.Tensor]:
    return list(result.logits.split([len(each.token_ids) for each in chunks]))


def test_many_in_one_step_are_each_as_alone(engine: AttentionEngine) -> None:
    """Three adapters and none, prefill and decode, one adapter twice: bit for bit what each is without the others."""
    run_step(engine, chunk(engine, "all", 4, 0, 32), chunk(engine, "", 5, 0, 32))
    chunks = [
        chunk(engine, "qv", 0),
        chunk(engine, "", 1),
        chunk(engine, "all", 4, 32, 33),
        chunk(engine, "tokens", 2),
        chunk(engine, "", 5, 32, 33),
        chunk(engine, "qv", 3, 0, 9),
    ]
    together = run_step(engine, *chunks)
    tokens = iter(together.token_ids)
    for each, logits in zip(chunks, logits_of(together, chunks), strict=True):
        alone = run_step(engine, each)
        width = alone.logits.shape[1]
        assert torch.equal(logits[:, :width], alone.logits), (each.adapter, each.start)
        assert (logits[:, width:] == -torch.inf).all()
        if each.sampling is not None:
            assert alone.token_ids == (next(tokens),)
    assert list(together.token_ids[:2]) == [lora_adapters.greedy("qv")[0], goldens.greedy("seed", "len33")[0]]


def run_in(engine: AttentionEngine, *chunks: SequenceChunk) -> StepResult:
    """One step of a worker of any type; its holes are filled in float32."""
    run = engine.begin(plan(engine, *chunks))
    at = run.advance(None)
    while isinstance(at, MoeInput):
        at = run.advance(fill(MoeInput(at.layer, at.x_TD.float())).to(engine.dtype))
    return at


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_workers_give_each_row_its_bits(dtype: str) -> None:
    """With many adapters as with none."""
    device = DeviceThread("test-lora")
    flags = tuple(f"{name}={path}" for name, path in NAMED.items())
    settings = AttentionWorkerSettings(
        model=str(goldens.DIRECTORY), dtype=dtype, threads=2, deterministic=True, num_pages=64, page_size=8, lora=flags
    )
    engine = load_engine(settings, AttentionMetrics(new_registry()), device)
    try:
        chunks = [chunk(engine, name, place) for place, name in enumerate(("qv", "", "all", "tokens", "qv"))]
        together = device.call(run_in, engine, *chunks)
        for each, logits in zip(chunks, logits_of(together, chunks), strict=True):
            alone = device.call(run_in, engine, each)
            assert torch.equal(logits[:, : alone.logits.shape[1]], alone.logits), each.adapter
    finally:
        device.stop()


def test_nobody_with_an_adapter_nothing_of_it(engine: AttentionEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without one does what a worker without any does."""
    from attention_worker.device_kernels import CpuKernels

    def never(*args: object) -> None:
        raise AssertionError("a correction was computed")

    monkeypatch.setattr(engine._model._kernels, "add_low_rank", never)
    assert isinstance(engine._model._kernels, CpuKernels)
    plain = chunk(engine, "", 0)
    assert torch.equal(run_step(engine, plain).logits, run_step(attention_engine(), plain).logits)


def test_an_adapter_that_is_not_loaded(engine: AttentionEngine) -> None:
    for worker in (engine, attention_engine()):
        with pytest.raises(FailedPrecondition, match="adapter 0123 is not loaded here") as error:
            worker.begin(plan(worker, dataclasses.replace(chunk(engine, "", 0), adapter="0123")))
        assert error.value.reason is Reason.ADAPTER_NOT_LOADED


class TestAddedTokens:
    """Ids 512 to 516 are there for sequences with the adapter, and for nobody else."""

    def test_only_with_their_adapter(self, engine: AttentionEngine) -> None:
        for name, limit in (("", 512), ("qv", 512), ("tokens", 517)):
            wrong = dataclasses.replace(chunk(engine, name, 0, 0, 3), token_ids=(1, limit, 2))
            with pytest.raises(InvalidRequest, match=rf"holds {limit}, must be below the vocabulary size {limit}"):
                engine.begin(plan(engine, wrong))

    def test_tables_and_draws_beside_others(self, engine: AttentionEngine) -> None:
        """Log-probabilities over vocabularies of two sizes in one step, and a token barred, one forced."""
        whole = TokenSampling(num_logprobs=-1)
        forced = TokenSampling(temperature=1.0, seed=3, bias_ids=(515,), bias=(100.0,), num_logprobs=2)
        chunks = [
            dataclasses.replace(chunk(engine, "", 0), sampling=whole, logits=LogitsScope.NONE),
            dataclasses.replace(chunk(engine, "tokens", 1), sampling=whole, logits=LogitsScope.NONE),
            dataclasses.replace(chunk(engine, "tokens", 2), sampling=forced, logits=LogitsScope.NONE),
            dataclasses.replace(
                chunk(engine, "tokens", 3),
                sampling=None,
                logits=LogitsScope.NONE,
                scoring=TokenScoring(31, (516, 3), -1),
            ),
        ]
        together = run_step(engine, *chunks)
        assert together.token_ids[1:] == (lora_adapters.greedy("tokens")[0], 515)
        assert [table.num_top for table in together.logprobs] == [512, 517, 2, 517]
        rows = together.logits
        assert rows.shape == (4, 517)
        assert (rows[0, 512:] == -torch.inf).all()
        expected = lora_adapters.logits("tokens")[-1].log_softmax(-1)
        torch.testing.assert_close(rows[1], expected, rtol=0, atol=1e-4)
        assert together.logprobs[3].token_ids == (516, 3)
        alone = [run_step(engine, each) for each in chunks]
        assert together.token_ids == tuple(token for result in alone for token in result.token_ids)
        for table, result in zip(together.logprobs, alone, strict=True):
            assert (table.token_ids, table.ranks) == (result.logprobs[0].token_ids, result.logprobs[0].ranks)
            torch.testing.assert_close(
                torch.tensor(table.logprobs), torch.tensor(result.logprobs[0].logprobs), rtol=1e-4, atol=1e-4
            )

    def test_a_faulty_chunk_is_named_by_its_place(self, engine: AttentionEngine) -> None:
        chunks = [chunk(engine, "tokens", 0), chunk(engine, "", 1), chunk(engine, "tokens", 2)]
        run = engine.begin(plan(engine, *chunks))
        at = run.advance(None)
        while isinstance(at, MoeInput):
            moe_TD = fill(at)
            moe_TD[70] = torch.nan  # a row of the third chunk
            at = run.advance(moe_TD)
        assert at.faulty_chunks == (2,)
        assert at.token_ids[:2] == (lora_adapters.greedy("tokens")[0], goldens.greedy("seed", "len33")[0])


@pytest.mark.parametrize("cuts", [(0, 1, 3), (0, 1, 2, 3)])
def test_stages_correct_their_own_layers(engine: AttentionEngine, cuts: tuple[int, ...]) -> None:
    """Each of a pipeline's has its layers' part, the first reads added tokens, the last draws them."""
    spans = [range(begin, end) for begin, end in itertools.pairwise(cuts)]
    stages = [attention_engine(held=held, adapters=adapter_store(NAMED, held=held)) for held in spans]
    chunks = [chunk(engine, name, place) for place, name in enumerate(("tokens", "", "all"))]
    hidden_TD = None
    for stage in stages:
        run = stage.begin(StepPlan(stage.incarnation, tuple(chunks), hidden_TD))
        last = finish(run)
        hidden_TD = last.hidden_state
    whole = run_step(engine, *chunks)
    assert torch.equal(last.logits, whole.logits)
    assert last.token_ids == whole.token_ids


class TestStore:
    def test_loading_while_steps_run(self, tmp_path: Path) -> None:
        shutil.copytree(lora_adapters.FOLDER / "all", tmp_path / "later")
        engine = attention_engine(adapters=adapter_store({}, tmp_path))

        async def load() -> None:
            assert engine.adapters is not None
            running = engine.begin(plan(engine, chunk(engine, "", 0)))
            first, second = await asyncio.gather(engine.adapters.load("later"), engine.adapters.load("later"))
            assert first is second
            assert engine.adapters.loaded == (first,)
            assert finish(running).token_ids == tuple(goldens.greedy("seed", "len33")[:1])

        asyncio.run(load())
        found = run_step(engine, dataclasses.replace(chunk(engine, "all", 0), adapter=id_of(engine, "later")))
        assert (found.logits - lora_adapters.logits("all")).abs().max() < 1e-4

    def test_other_content_under_a_name_is_another_adapter(self, tmp_path: Path) -> None:
        shutil.copytree(lora_adapters.FOLDER / "all", tmp_path / "x")
        store = adapter_store({}, tmp_path)

        async def load() -> None:
            before = await store.load("x")
            shutil.rmtree(tmp_path / "x")
            shutil.copytree(lora_adapters.FOLDER / "qv", tmp_path / "x")
            after = await store.load("x")
            assert store.loaded == (before, after)
            assert before.id != after.id
            assert store.find(before.id).info.targets != store.find(after.id).info.targets

        asyncio.run(load())

    def test_a_step_outlives_its_adapter(self) -> None:
        store = adapter_store(NAMED)
        engine = attention_engine(adapters=store)
        run = engine.begin(plan(engine, chunk(engine, "qv", 0)))
        adapter_id = id_of(engine, "qv")
        assert store.unload(adapter_id)
        assert not store.unload(adapter_id)
        assert finish(run).token_ids == tuple(lora_adapters.greedy("qv")[:1])
        with pytest.raises(FailedPrecondition):
            store.find(adapter_id)

    def test_what_is_refused_and_why(self, tmp_path: Path) -> None:
        lora_adapters.changed(tmp_path / "dora", config={"use_dora": True})
        lora_adapters.changed(tmp_path / "good")
        store = adapter_store({}, tmp_path, max_bytes=100)

        async def load() -> None:
            with pytest.raises(FailedPrecondition, match=r"adapter dora: .*use_dora unset") as refused:
                await store.load("dora")
            assert refused.value.reason is Reason.ADAPTER_REFUSED
            with pytest.raises(ResourceExhausted, match="122880 bytes, 100 of 100 are free") as full:
                await store.load("good")
            assert full.value.reason is Reason.NO_ROOM
            with pytest.raises(NotFound, match="no adapter other; it has: dora, good"):
                await store.load("other")
            with pytest.raises(InvalidRequest):
                await store.load("../good")
            assert store.loaded == ()

        asyncio.run(load())

    def test_at_start(self, tmp_path: Path) -> None:
        settings = AttentionWorkerSettings(model=str(goldens.DIRECTORY), dtype="float32", num_pages=64, threads=1)
        lora_adapters.changed(tmp_path / "bad", config={"use_dora": True})
        for flag, error in ((f"x={tmp_path / 'bad'}", CheckpointError), (f"x={tmp_path / 'no'}", CheckpointError),
                            (f"../x={tmp_path}", ConfigError)):  # fmt: skip
            device = DeviceThread("test-lora")
            with pytest.raises(error, match="x"):
                load_engine(dataclasses.replace(settings, lora=(flag,)), AttentionMetrics(new_registry()), device)
            device.stop()
