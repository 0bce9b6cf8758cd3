"""The CPU attention kernel against its plain twin."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_worker.device_kernels import CpuKernels, PlainKernels, select_kernels
from attention_worker.kernels import cpu, reference, tiles
from attention_worker.step_batch import StepBatch
from grokmoe.step_plan import SequenceChunk

FLOAT32_MAX_ERROR = 1e-5
"""Of outputs up to 1 in size; larger ones have proportionally more."""
BFLOAT16_RELATIVE_RMS = 4e-3
SCALE_OF_SCORES = 3.0

MIXED = [(0, 1), (0, 7), (0, 65), (5, 1), (63, 1), (64, 1), (40, 33), (100, 130), (17, 1), (200, 1), (3, 2)]
"""(start, tokens): prompts of one token and more, continued prefill, decodes at many lengths."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small gain nothing from threads, and tests may run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Step:
    q_THd: torch.Tensor
    k_KPSd: torch.Tensor
    v_KPSd: torch.Tensor
    batch: StepBatch
    cap: float = 30.0

    def run(self, kernel=cpu.paged_attention) -> torch.Tensor:
        return kernel(self.q_THd, self.k_KPSd, self.v_KPSd, self.batch, self.q_THd.shape[-1] ** -0.5, self.cap)

    def expected(self) -> torch.Tensor:
        """The twin in float32 on the same inputs."""
        wide = Step(self.q_THd.float(), self.k_KPSd.float(), self.v_KPSd.float(), self.batch, self.cap)
        return wide.run(reference.paged_attention)

    def check(self) -> None:
        out = self.run()
        assert out.shape == self.q_THd.shape
        assert out.dtype == self.q_THd.dtype
        error = out.float() - self.expected()
        if out.dtype == torch.float32:
            assert error.abs().max() <= FLOAT32_MAX_ERROR * max(1.0, self.expected().abs().max().item())
        else:
            relative_rms = error.square().mean().sqrt() / self.expected().square().mean().sqrt()
            assert relative_rms <= BFLOAT16_RELATIVE_RMS


def make_step(
    spans: Sequence[tuple[int, int]],
    page_size: int = 16,
    num_heads: int = 8,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    canaries: bool = True,
) -> Step:
    """A step of (start, tokens) chunks over shuffled pages; every slot that holds no token is NaN."""
    generator = torch.Generator().manual_seed(seed)
    counts = [math.ceil((start + length) / page_size) for start, length in spans]
    num_pages = sum(counts) + 3
    pages = torch.randperm(num_pages, generator=generator).tolist()
    chunks = []
    for (start, length), count in zip(spans, counts, strict=True):
        chunks.append(SequenceChunk((1,) * length, start, tuple(pages.pop() for _ in range(count))))
    batch = StepBatch.build(chunks, page_size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    k, v = (normal(num_kv_heads, num_pages, page_size, head_dim) for _ in range(2))
    if canaries:
        unused = torch.ones(num_pages * page_size, dtype=torch.bool)
        for chunk in chunks:
            for position in range(chunk.start + len(chunk.token_ids)):
                unused[chunk.page_ids[position // page_size] * page_size + position % page_size] = False
        for pool in (k, v):
            pool.view(num_kv_heads, -1, head_dim)[:, unused] = math.nan
    return Step(SCALE_OF_SCORES * normal(len(batch.slots_T), num_heads, head_dim), k, v, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
def test_mixed_batch_over_shuffled_pages(page_size: int, dtype: torch.dtype) -> None:
    make_step(MIXED, page_size=page_size, dtype=dtype).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 2), (4, 1), (12, 2)])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_head_groups_and_sizes(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    make_step(MIXED, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_at_the_cap_keep_float32_weights(dtype: torch.dtype) -> None:
    # Scores rounded to bfloat16 move weights by up to 6 % here: a relative RMS of about 2e-2.
    step = make_step([(511, 1)] * 4 + [(300, 70)], head_dim=64, dtype=dtype)
    step.q_THd *= 8
    step.check()


@pytest.mark.parametrize("cap", [0.5, 5.0, 34.0, 60.0, 1000.0])
def test_caps_from_tiny_to_none(cap: float) -> None:
    step = make_step(MIXED)
    step.cap = cap
    step.q_THd *= 4
    error = (step.run() - step.expected()).abs().max()
    assert error <= max(FLOAT32_MAX_ERROR, cap * 1e-6)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("cap", [30.0, 100.0])
def test_all_scores_at_one_end_of_the_cap(sign: float, cap: float) -> None:
    step = make_step([(0, 20), (50, 1)])
    step.cap = cap
    step.q_THd.fill_(sign * 100)
    step.k_KPSd.masked_fill_(~step.k_KPSd.isnan(), 100.0)
    step.check()


def test_many_decodes_of_unlike_lengths() -> None:
    make_step([(length, 1) for length in range(0, 900, 13)], head_dim=32).check()


def test_sequences_share_prefix_pages() -> None:
    step = make_step([(0, 64), (0, 96)], canaries=False)
    long = step.batch.chunks[1]
    chunks = [
        SequenceChunk((1,), 31, long.page_ids[:2]),
        SequenceChunk((1,) * 30, 64, (*long.page_ids[:4], *step.batch.chunks[0].page_ids[:2])),
        SequenceChunk((1,), 40, (*long.page_ids[:2], step.batch.chunks[0].page_ids[3])),
    ]
    batch = StepBatch.build(chunks, 16)
    Step(step.q_THd[: len(batch.slots_T)], step.k_KPSd, step.v_KPSd, batch).check()


def test_long_prompt_is_cut_into_several_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_BYTES", 1 << 17)
    monkeypatch.setattr(tiles, "GROUP_BYTES", 1 << 19)
    step = make_step([(0, 500), (37, 300), *[(n, 1) for n in range(400, 430)]], dtype=torch.bfloat16)
    step.check()
    (groups,) = step.batch._groups.values()
    assert len(groups) > 5


def test_groups_grow_with_work_not_with_sequences() -> None:
    step = make_step([(n % 50, 10) for n in range(256)], canaries=False, dtype=torch.bfloat16)
    step.run()
    (groups,) = step.batch._groups.values()
    assert len(groups) <= 3


def test_deterministic_rows_are_computed_one_by_one() -> None:
    """In bfloat16 a row of a long chunk then has the bits it has alone."""
    step = make_step([(40, 33)], dtype=torch.bfloat16)
    chunk = step.batch.chunks[0]
    alone = StepBatch.build([SequenceChunk((1,), 60, chunk.page_ids)], 16)
    kernel = functools.partial(cpu.paged_attention, deterministic=True)
    part = Step(step.q_THd[20:21], step.k_KPSd, step.v_KPSd, alone).run(kernel)
    assert torch.equal(part[0], step.run(kernel)[20])
    assert not step.batch._groups
    step.run()
    assert step.batch._groups


def test_queries_and_caches_that_are_views() -> None:
    step = make_step(MIXED)
    qkv = torch.cat([step.q_THd.flatten(1), torch.zeros(len(step.q_THd), 64)], dim=1)
    view = Step(qkv[:, :256].view(-1, 8, 32), step.k_KPSd, step.v_KPSd, step.batch)
    assert torch.equal(view.run(), step.run())


@pytest.mark.parametrize("kernel", [cpu.paged_attention, reference.paged_attention])
def test_empty_batch(kernel) -> None:
    cache = torch.full((2, 4, 16, 32), math.nan)
    out = Step(torch.empty(0, 8, 32), cache, cache, StepBatch.build([], 16)).run(kernel)
    assert out.shape == (0, 8, 32)


def test_page_outside_the_cache_is_refused() -> None:
    cache = torch.zeros(2, 4, 16, 32)
    batch = StepBatch.build([SequenceChunk((1,), 0, (4,))], 16)
    with pytest.raises(IndexError, match="page 4"):
        Step(torch.zeros(1, 8, 32), cache, cache, batch).run()


def test_the_same_sequence_alone_and_in_a_batch() -> None:
    step = make_step(MIXED)
    row = 0
    for chunk, out in zip(step.batch.chunks, step.run().split([n for _, n in MIXED]), strict=True):
        alone = StepBatch.build([chunk], 16)
        q_THd = step.q_THd[row : row + len(chunk.token_ids)]
        error = (Step(q_THd, step.k_KPSd, step.v_KPSd, alone).run() - out).abs().max()
        assert error <= 2e-6
        row += len(chunk.token_ids)


def test_the_device_chooses_the_kernel() -> None:
    assert isinstance(select_kernels("cpu"), CpuKernels)
    assert isinstance(select_kernels(torch.device("meta")), PlainKernels)


@settings(max_examples=40, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 90)), min_size=1, max_size=12),
    page_size=st.sampled_from([1, 3, 4, 16, 64]),
    heads=st.sampled_from([(1, 1), (2, 1), (6, 2), (4, 4)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_batch(
    spans: list[tuple[int, int]], page_size: int, heads: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    make_step(spans, page_size, *heads, head_dim=32, dtype=dtype, seed=seed).check()
