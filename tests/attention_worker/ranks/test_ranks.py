"""An attention worker of several ranks, as threads: what it computes is what one rank computes.

Real processes: tests/cluster/test_tensor_parallel.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attention_worker.engine import MoeInput
from grokmoe.checkpoint import Checkpoint
from grokmoe.checkpoint_writer import random_checkpoint
from grokmoe.model_config import TINY
from grokmoe.step_plan import GREEDY, LogitsScope, SequenceChunk, StepPlan, StepResult, TokenSampling, TokenScoring
from tests import goldens
from tests.attention_worker.ranks.dense_experts import DenseExperts
from tests.attention_worker.ranks.rank_threads import RankThreads, rank_threads, wait_until
from tests.attention_worker.tiny_engine import attention_engine, fill, run_step

PROMPT = tuple(goldens.PROMPTS["len33"])
PAGES = (7, 2, 9, 4, 0, 11)
FIRST = goldens.greedy("seed", "len33")[0]


def filling(dtype: torch.dtype) -> Callable[[MoeInput], torch.Tensor]:
    """Experts in float32 behind holes of another type."""
    return lambda at: fill(dataclasses.replace(at, x_TD=at.x_TD.float())).to(dtype)


def decode(worker: RankThreads, prompt: str, chunk: int = 512) -> list[int]:
    token_ids = list(goldens.PROMPTS[prompt])
    num_prompt, start, pages = len(token_ids), 0, tuple(range(12))
    while len(token_ids) < num_prompt + 16:
        end = min(len(token_ids), start + chunk)
        sampling = GREEDY if end == len(token_ids) else None
        token_ids += worker.step(
            SequenceChunk(tuple(token_ids[start:end]), start, pages[: -(-end // 8)], sampling)
        ).token_ids
        start = end
    return token_ids[num_prompt:]


@pytest.mark.parametrize("size", [2, 3, 6])
def test_prefill_and_decode_give_the_golden_tokens(size: int) -> None:
    """6 query heads and 2 KV heads: two ranks have a KV head each, of three the second reads both, six share them."""
    with rank_threads(size, goldens.DIRECTORY, fill) as worker:
        for prompt in goldens.PROMPTS:
            assert decode(worker, prompt) == goldens.greedy("seed", prompt)


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_prefill_in_chunks(chunk: int) -> None:
    with rank_threads(2, goldens.DIRECTORY, fill) as worker:
        assert decode(worker, "len33", chunk) == goldens.greedy("seed", "len33")


@pytest.mark.parametrize("size", [2, 3])
def test_a_batch_with_all_that_can_be_asked_for(size: int) -> None:
    """Prefill and decode mixed, shared pages, logits, scores, draws: as by one rank."""
    how = TokenSampling(temperature=0.8, top_k=40, seed=5, allowed=b"\xff\x7f" * 32, num_logprobs=3)
    steps = (
        (SequenceChunk(PROMPT[:16], 0, PAGES[:2]),),
        (
            SequenceChunk(PROMPT[16:], 16, PAGES[:5], GREEDY, LogitsScope.ALL),
            SequenceChunk(PROMPT[16:], 16, (*PAGES[:2], 20, 21, 22), how),
            SequenceChunk(PROMPT[:7], 0, (30,), None, LogitsScope.NONE, TokenScoring(2, (5, 6), 3)),
            SequenceChunk(PROMPT[:3], 0, (31,)),
        ),
        (SequenceChunk((FIRST,), 33, PAGES[:5], GREEDY), SequenceChunk((9,), 3, (31,), how)),
    )
    one = attention_engine()
    with rank_threads(size, goldens.DIRECTORY, fill) as worker:
        for chunks in steps:
            expected, found = run_step(one, *chunks), worker.step(*chunks)
            assert found.token_ids == expected.token_ids
            assert [table.token_ids for table in found.logprobs] == [table.token_ids for table in expected.logprobs]
            if expected.logits is not None:
                assert (found.logits - expected.logits).abs().max() < 1e-4
                assert (found.logits - goldens.logits("seed", "len33")[16:]).abs().max() < 1e-4


def test_every_rank_keeps_the_same_residual_and_pages_of_its_own_heads() -> None:
    """Keys and values, side by side in the order of the heads, are those of one rank."""
    one = attention_engine()
    run_step(one, SequenceChunk(PROMPT, 0, PAGES[:5], GREEDY))
    with rank_threads(2, goldens.DIRECTORY, fill) as worker:
        worker.step(SequenceChunk(PROMPT, 0, PAGES[:5], GREEDY))
    for layer in range(3):
        for name in ("k_KPSd", "v_KPSd"):
            parts = [getattr(engine.cache, name)[layer] for engine in worker.engines]
            assert [len(part) for part in parts] == [1, 1]
            torch.testing.assert_close(torch.cat(parts), getattr(one.cache, name)[layer], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_s_bits_do_not_depend_on_its_company(dtype: torch.dtype) -> None:
    """Alone, in a batch, in chunks: the order of the ranks' sum is the same in each."""
    whole = SequenceChunk(PROMPT, 0, PAGES[:5], None, LogitsScope.ALL)
    with rank_threads(3, goldens.DIRECTORY, filling(dtype), dtype, deterministic=True) as worker:
        alone = worker.step(whole).logits
        others = (
            SequenceChunk(tuple(goldens.PROMPTS["len70"]), 0, tuple(range(20, 29))),
            SequenceChunk((4,), 0, (30,)),
        )
        assert torch.equal(worker.step(*others, whole).logits, alone)
        first = worker.step(SequenceChunk(PROMPT[:10], 0, PAGES[:2], None, LogitsScope.ALL)).logits
        rest = worker.step(SequenceChunk(PROMPT[10:], 10, PAGES[:5], None, LogitsScope.ALL)).logits
        assert torch.equal(torch.cat((first, rest)), alone)


@pytest.mark.parametrize("num_holes", [0, 1, 2, 3])
def test_a_step_that_is_dropped_leaves_all_ranks_in_step(num_holes: int) -> None:
    with rank_threads(2, goldens.DIRECTORY, fill) as worker:
        run = worker.begin(SequenceChunk(PROMPT, 0, PAGES[:5], GREEDY))
        at = worker.advance(run, None) if num_holes else None
        for _ in range(num_holes - 1):
            assert isinstance(at, MoeInput)
            at = worker.advance(run, fill(at))
        worker.devices[0].post(run.close)
        worker.devices[0].post(run.close)
        assert worker.step(SequenceChunk(PROMPT, 0, PAGES[:5], GREEDY)).token_ids == (FIRST,)
        assert worker.followers[0].num_steps == 0


def test_a_step_that_is_forgotten_is_dropped() -> None:
    """Its generator is closed by the garbage collector, on a thread that must not send."""
    with rank_threads(2, goldens.DIRECTORY, fill) as worker:
        run = worker.begin(SequenceChunk(PROMPT, 0, PAGES[:5], GREEDY))
        worker.advance(run, None)
        wait_until(lambda: worker.followers[0].num_steps == 1)
        del run
        assert worker.step(SequenceChunk(PROMPT, 0, PAGES[:5], GREEDY)).token_ids == (FIRST,)
        assert worker.followers[0].num_steps == 0


def test_steps_side_by_side() -> None:
    """Lanes: each step goes on where it was, whatever the other does; one of them is given up in the middle."""
    with rank_threads(2, goldens.DIRECTORY, fill) as worker:
        runs = [
            worker.begin(SequenceChunk(PROMPT, 0, PAGES[:5], GREEDY)),
            worker.begin(SequenceChunk(tuple(goldens.PROMPTS["len7"]), 0, (20,), GREEDY)),
            worker.begin(SequenceChunk(tuple(goldens.PROMPTS["len2"]), 0, (21,), GREEDY)),
        ]
        ats = [worker.advance(run, None) for run in runs]
        worker.devices[0].post(runs.pop().close)
        for _ in range(3):
            for index, run in enumerate(runs):
                at = ats[index]
                assert isinstance(at, MoeInput)
                ats[index] = worker.advance(run, fill(at))
        assert ats[:2] == [StepResult((goldens.greedy("seed", name)[0],)) for name in ("len33", "len7")]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named_and_goes_no_further(poison: float) -> None:
    chunks = [SequenceChunk(PROMPT[:7], 0, (page,), GREEDY) for page in (1, 2, 3)]
    clean = run_step(attention_engine(), chunks[0]).token_ids
    with rank_threads(2, goldens.DIRECTORY, fill) as worker:
        run = worker.begin(*chunks)
        at = worker.advance(run, None)
        while isinstance(at, MoeInput):
            out_TD = fill(at)
            if at.layer == 1:
                out_TD[9, 5] = poison
            at = worker.advance(run, out_TD)
        assert at.faulty_chunks == (1,)
        assert (at.token_ids[0], at.token_ids[2]) == clean * 2
        assert worker.step(chunks[0]).token_ids == clean


@pytest.mark.parametrize("cuts", [(0, 1, 3), (0, 2, 3)])
def test_stages_of_ranks(cuts: tuple[int, ...]) -> None:
    """A pipeline whose stages are tensor-parallel: the residual goes from leader to leader, and to each one's ranks."""
    chunk = SequenceChunk(PROMPT, 0, PAGES[:5], GREEDY, LogitsScope.ALL)
    with (
        rank_threads(2, goldens.DIRECTORY, fill, held=range(cuts[0], cuts[1])) as first,
        rank_threads(3, goldens.DIRECTORY, fill, held=range(cuts[1], cuts[2])) as last,
    ):
        hidden_TD = first.step(chunk).hidden_state
        result = last.finish(last.engine.begin(StepPlan(last.engine.incarnation, (chunk,), hidden_TD)))
    assert result.token_ids == (FIRST,)
    assert (result.logits - goldens.logits("seed", "len33")).abs().max() < 1e-4


def test_bfloat16_is_as_near_as_one_rank_s() -> None:
    chunk = SequenceChunk(PROMPT, 0, PAGES[:5], None, LogitsScope.ALL)
    expected = goldens.logits("seed", "len33")
    with rank_threads(2, goldens.DIRECTORY, filling(torch.bfloat16), torch.bfloat16) as worker:
        found = worker.step(chunk).logits
    error = (found - expected).square().mean(-1).sqrt() / expected.square().mean(-1).sqrt()
    assert error.median() < 0.05


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_another_model_against_the_reference(tmp_path: Path, size: int, tied: bool) -> None:
    """8 query heads and 2 KV heads; a vocabulary that needs filling up; a head of its own."""
    config = dataclasses.replace(TINY, num_heads=8, num_kv_heads=2, vocab_size=300, tie_word_embeddings=tied)
    random_checkpoint(tmp_path, config, seed=3)
    token_ids = tuple((7 * i) % 300 for i in range(40))
    with Checkpoint.open(tmp_path) as checkpoint:
        experts = DenseExperts(checkpoint)
    with rank_threads(size, tmp_path, experts.fill) as worker:
        found = worker.step(SequenceChunk(token_ids, 0, PAGES[:5], GREEDY, LogitsScope.ALL))
    expected = experts.reference.logits(token_ids)
    assert (found.logits - expected).abs().max() < 1e-4
    assert found.token_ids == (int(expected[-1].argmax()),)
