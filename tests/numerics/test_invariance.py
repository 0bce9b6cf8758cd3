"""A sequence's bits do not depend on its company: operation by operation, and whole models in every arrangement."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_worker.device_kernels import CpuKernels, select_kernels
from attention_worker.layers import Rope
from attention_worker.step_batch import StepBatch
from grokmoe import packed_linear
from grokmoe.model_config import TINY, Gelu, ModelConfig
from grokmoe.packed_linear import FIXED_ROWS, PackedLinear, can_pack
from grokmoe.step_plan import SequenceChunk
from launcher.paths import DEMO_MODEL
from router import dispatch
from router.engine import Engine
from router.gating import gate
from tests import goldens
from tests.topologies import Setup, fused, request, run, split

DTYPES = [torch.float32, torch.bfloat16]
HEADS = [(1, 1), (5, 1), (6, 2), (8, 2), (4, 4), (12, 2)]


def is_promised() -> bool:
    """Without the mode the bits hold on CPUs like those they were observed on."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and can_pack(torch.float32)


# ---- operations


@settings(max_examples=60)
@given(
    lengths=st.lists(st.sampled_from([1, 17, 40, 150, 200, 420, 1100]), min_size=1, max_size=4),
    heads=st.sampled_from(HEADS),
    head_dim=st.sampled_from([16, 32, 128]),
    page_size=st.sampled_from([1, 3, 16, 64]),
    cap=st.sampled_from([30.0, 60.0]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_attention(
    lengths: list[int],
    heads: tuple[int, int],
    head_dim: int,
    page_size: int,
    cap: float,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    """Any part of any sequences, in any order and together, against all of them at once."""
    generator = torch.Generator().manual_seed(0)
    num_pages = [-(-length // page_size) for length in lengths]
    pages = [tuple(range(sum(num_pages[:i]), sum(num_pages[: i + 1]))) for i in range(len(lengths))]
    shape = (heads[1], sum(num_pages), page_size, head_dim)
    k_KPSd, v_KPSd = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    queries = [(3 * torch.randn(n, heads[0], head_dim, generator=generator)).to(dtype) for n in lengths]
    kernel = select_kernels("cpu", deterministic=True).attend

    def attend(spans: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
        batch = StepBatch.build(
            [SequenceChunk((0,) * (end - begin), begin, pages[i]) for i, begin, end in spans], page_size
        )
        q_THd = torch.cat([queries[i][begin:end] for i, begin, end in spans])
        out_THd = kernel(q_THd, k_KPSd, v_KPSd, batch, head_dim**-0.5, cap)
        return list(out_THd.split([end - begin for _, begin, end in spans]))

    everything = attend([(i, 0, length) for i, length in enumerate(lengths)])
    spans = []
    for index in data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True)):
        begin = data.draw(st.integers(0, lengths[index] - 1))
        num = data.draw(st.sampled_from([1, 1, 2, 7, 33, 65, 200]))
        spans.append((index, begin, min(begin + num, lengths[index])))
    for (index, begin, end), out_THd in zip(spans, attend(spans), strict=True):
        assert torch.equal(out_THd, everything[index][begin:end]), (index, begin, end)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_with_other_numbers_of_threads(dtype: torch.dtype) -> None:
    num_keys = 31 * 32
    generator = torch.Generator().manual_seed(0)
    q_THd = torch.randn(3, 15, 32, generator=generator).to(dtype)
    k_KPSd, v_KPSd = (torch.randn(3, num_keys, 1, 32, generator=generator).to(dtype) for _ in range(2))
    pages = tuple(range(num_keys))
    batch = StepBatch.build([SequenceChunk((0,), num_keys - 1 - index, pages) for index in range(3)], 1)
    kernel = select_kernels("cpu", deterministic=True).attend
    before = torch.get_num_threads()
    try:
        found = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            found.append(kernel(q_THd, k_KPSd, v_KPSd, batch, 0.2, 30.0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def check_rows(compute: Callable[[slice], Sequence[torch.Tensor]], num_rows: int) -> None:
    """`compute` of any run of rows gives each row what it has among all."""
    everything = compute(slice(0, num_rows))
    for count in (1, 2, 3, 5, 8, 13, 16, 31, 33, 64, 100):
        for begin in (0, 3, num_rows - count):
            for part, whole in zip(compute(slice(begin, begin + count)), everything, strict=True):
                assert torch.equal(part, whole[begin : begin + count]), (count, begin)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sizes", [(192, 320), (1280, 64), (48, 1100)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype: torch.dtype, sizes: tuple[int, int], deterministic: bool) -> None:
    """With 1280 inputs a single row alone would differ."""
    if not deterministic and not is_promised():
        pytest.skip("not promised on this CPU")
    generator = torch.Generator().manual_seed(0)
    num_in, num_out = sizes
    linear = PackedLinear((torch.randn(num_out, num_in, generator=generator) / num_in**0.5).to(dtype), deterministic)
    x_NI = torch.randn(300, num_in, generator=generator).to(dtype)
    times_NO = torch.randn(300, num_out, generator=generator).to(dtype)
    check_rows(lambda rows: [linear(x_NI[rows]), linear(x_NI[rows], Gelu.ERF)], 300)
    check_rows(lambda rows: [linear(x_NI[rows], times_NO=times_NO[rows])], 300)


def test_row_counts_that_disagree_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which only multiples of 8 agree."""
    product = PackedLinear.product

    def odd_product(self: PackedLinear, x_NI: torch.Tensor, *args: object) -> torch.Tensor:
        y_NO = product(self, x_NI, *args)  # type: ignore[arg-type]
        return y_NO if len(x_NI) % 8 == 0 else y_NO * 1.0001

    monkeypatch.setattr(PackedLinear, "product", odd_product)
    monkeypatch.setattr(packed_linear, "_agreeing", {})
    linear = PackedLinear(torch.randn(24, 40), deterministic=True)
    assert FIXED_ROWS in linear.row_counts
    assert all(count % 8 == 0 for count in linear.row_counts)
    x_NI = torch.randn(300, 40)
    check_rows(lambda rows: [linear(x_NI[rows])], 300)


@pytest.mark.parametrize("hidden", [192, 1024, 6144])
def test_gate_norm_and_combine(hidden: int) -> None:
    if not is_promised():
        pytest.skip("not promised on this CPU")
    generator = torch.Generator().manual_seed(0)
    x_TD, gain_D = torch.randn(200, hidden, generator=generator), torch.randn(hidden, generator=generator)
    gate_ED = torch.randn(8, hidden, generator=generator) / hidden**0.5
    check_rows(lambda rows: gate(x_TD[rows], gate_ED, TINY), 200)
    kernels = CpuKernels()
    check_rows(lambda rows: [kernels.norm(x_TD[rows], gain_D, 1e-5, dtype) for dtype in DTYPES], 200)

    def added(rows: slice) -> list[torch.Tensor]:
        h_TD = x_TD[rows].clone()
        kernels.add_normed(h_TD, x_TD[rows] * 0.3, gain_D, 1e-5)
        return [h_TD]

    check_rows(added, 200)

    def moe(rows: slice) -> list[torch.Tensor]:
        weights_TK, expert_ids_TK = gate(x_TD[rows], gate_ED, TINY)
        plan = dispatch.plan(expert_ids_TK, weights_TK, dict(enumerate([0, 1, 0, 1, 2, 2, 0, 1])))
        return [dispatch.combine(plan, dispatch.gather(plan, x_TD[rows]) * 0.7)]

    check_rows(moe, 200)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rope = Rope(32, 500, 10000.0)
    q_THd = torch.randn(200, 6, 32, generator=generator).to(dtype)
    positions_T = torch.randint(0, 500, (200,), generator=generator)
    check_rows(lambda rows: [Rope.rotate(q_THd[rows], rope.angles(positions_T[rows]))], 200)


# ---- whole models

NUM_TOKENS = 6
Answer = tuple[list[int], torch.Tensor]
Topology = Callable[[Setup], contextlib.AbstractAsyncContextManager[Engine]]


ExactSetup = functools.partial(Setup, deterministic=True)


def prompts() -> list[list[int]]:
    """Thirty-two: the goldens' and random ones."""
    draw = random.Random(0)
    others = [[draw.randrange(4, 500) for _ in range(draw.randrange(1, 60))] for _ in range(27)]
    return [*goldens.PROMPTS.values(), *others]


async def answer(engine: Engine, prompt: Sequence[int], num_tokens: int = NUM_TOKENS) -> Answer:
    tokens, logits = await run(engine, request(prompt, num_tokens, logits=True))
    assert logits is not None
    return tokens, logits


async def answers(topology: Topology, setup: Setup, together: bool) -> list[Answer]:
    async with topology(setup) as engine:
        if together:
            return list(await asyncio.gather(*(answer(engine, prompt) for prompt in prompts())))
        return [await answer(engine, prompt) for prompt in prompts()[: len(goldens.PROMPTS)]]


@functools.cache
def alone(model: object, dtype: str) -> list[Answer]:
    """The goldens' prompts one after the other, with chunks and pages of the default size."""
    return asyncio.run(answers(fused, ExactSetup(model, dtype), together=False))  # type: ignore[arg-type]


def check(actual: list[Answer], expected: list[Answer]) -> None:
    """Of what is expected, bit by bit; there may be more requests, and more tokens."""
    for (tokens, logits), (expected_tokens, expected_logits) in zip(actual, expected, strict=False):
        assert tokens[: len(expected_tokens)] == expected_tokens
        logits = logits[: len(expected_logits)]
        assert torch.equal(logits, expected_logits), (logits - expected_logits).abs().max()


ARRANGEMENTS: dict[str, tuple[Topology, dict[str, Any]]] = {
    "batch of 32": (fused, {}),
    "chunks of 3": (fused, {"max_step_tokens": 3}),
    "chunks of 16": (fused, {"max_step_tokens": 16, "page_size": 8}),
    "chunks of 33": (fused, {"max_step_tokens": 33, "page_size": 4}),
    "chunks of 64": (fused, {"max_step_tokens": 64, "page_size": 64}),
    "1 expert worker": (split, {"num_experts": 1}),
    "2 attention and 4 expert workers, 2 lanes": (split, {"num_experts": 4, "num_attention": 2, "lanes": 2}),
    "a pipeline of 3": (split, {"stage_layers": ("0", "1", "2-last")}),
    "2 uneven pipelines": (split, {"stage_layers": ("0", "1-last"), "num_attention": 2}),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [goldens.DIRECTORY, DEMO_MODEL], ids=["tiny", "demo"])
def test_thirty_two_at_once(model: object, dtype: str, arrangement: str) -> None:
    topology, sizes = ARRANGEMENTS[arrangement]
    last = str(ModelConfig.from_file(model).num_layers - 1)  # type: ignore[arg-type]
    stages = tuple(layers.replace("last", last) for layers in sizes.get("stage_layers", ("all",)))
    setup = ExactSetup(model, dtype, **{**sizes, "stage_layers": stages})  # type: ignore[arg-type]
    check(asyncio.run(answers(topology, setup, together=True)), alone(model, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_token_by_token(dtype: str) -> None:
    setup = ExactSetup(goldens.DIRECTORY, dtype, max_step_tokens=1, page_size=1)
    check(asyncio.run(answers(fused, setup, together=False)), alone(goldens.DIRECTORY, dtype))


def test_without_the_mode() -> None:
    """The same bits, where they are promised without it."""
    if not is_promised():
        pytest.skip("not promised on this CPU")
    setup = Setup(goldens.DIRECTORY, "float32")
    check(asyncio.run(answers(fused, setup, together=True)), alone(goldens.DIRECTORY, "float32"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed(dtype: str) -> None:
    """Pages for few: sequences take each other's and are computed again, in other chunks than the first time."""

    async def go() -> tuple[list[Answer], int]:
        setup = ExactSetup(goldens.DIRECTORY, dtype, page_size=8, num_pages=16, max_step_tokens=24)
        async with fused(setup) as engine:
            many = [*goldens.PROMPTS.values()] * 3
            found = await asyncio.gather(*(answer(engine, prompt, 3 * NUM_TOKENS) for prompt in many))
            return list(found), engine.report.num_preemptions

    found, num_preemptions = asyncio.run(go())
    assert num_preemptions > 0
    check(found, alone(goldens.DIRECTORY, dtype) * 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_the_prefix_cache(dtype: str) -> None:
    """A prompt whose pages another request has left. Logits of all positions would have it computed again, so the
    tokens and the log-probabilities of what was drawn are compared."""
    prompt = goldens.PROMPTS["len70"]

    async def draw(engine: Engine) -> tuple[list[int], list[float]]:
        generation = engine.submit(dataclasses.replace(request(prompt, NUM_TOKENS), logprobs=1))
        tokens: list[int] = []
        logprobs: list[float] = []
        while True:
            (delivery,) = await generation.take()
            tokens += delivery.token_ids
            logprobs += [value for table in delivery.logprobs for value in table.logprobs]
            if delivery.finish_reason is not None:
                return tokens, logprobs

    async def go() -> tuple[list[tuple[list[int], list[float]]], int]:
        async with fused(ExactSetup(goldens.DIRECTORY, dtype, page_size=8)) as engine:
            return [await draw(engine) for _ in range(2)], engine.cells[0].scheduler.prefix_hits_tokens

    (first, second), num_hits = asyncio.run(go())
    assert num_hits >= 64
    assert first == second
    assert len(first[1]) == NUM_TOKENS
    assert first[0] == alone(goldens.DIRECTORY, dtype)[list(goldens.PROMPTS).index("len70")][0]
