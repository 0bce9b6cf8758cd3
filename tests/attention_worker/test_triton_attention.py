"""The Triton attention kernel, interpreted, against its plain twin.

What it compiles to is in test_triton_compile.py; the same comparison on a GPU in tests/gpu.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from attention_worker.step_batch import StepBatch
from grokmoe.step_plan import SequenceChunk
from tests.attention_worker.test_paged_attention import Step, make_step

SPLIT = 64
"""Keys of a split, fewer than in production: short sequences show what long ones would."""

MIXED = [(0, 1), (5, 1), (40, 9), (130, 1), (190, 3)]
"""(start, tokens): a prompt of one token, decodes, continued prefill, and keys enough to be split."""


@pytest.fixture
def triton_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, with its kernels in the interpreter, for a device of so many multiprocessors that keys are split."""
    pytest.importorskip("triton")
    from attention_worker.kernels import device_tiles, triton_attention
    from tests.triton_interpreter import interpreted

    monkeypatch.setattr(triton_attention, "num_processors", lambda device: 8)
    monkeypatch.setattr(device_tiles, "LEAST_SPLIT", SPLIT)
    monkeypatch.setattr(device_tiles, "FIXED_SPLIT", SPLIT)
    with interpreted():
        yield triton_attention


def check(step: Step, kernel: object) -> None:
    """`Step.check` of another kernel."""
    step.run = functools.partial(step.run, kernel)  # type: ignore[method-assign]
    step.expected = functools.partial(Step.expected, Step(step.q_THd, step.k_KPSd, step.v_KPSd, step.batch, step.cap))  # type: ignore[method-assign]
    step.check()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_batch(triton_attention: ModuleType, dtype: torch.dtype, deterministic: bool) -> None:
    """Decode and prefill, whole and split, over shuffled pages; slots that hold no token are NaN."""
    step = make_step(MIXED, head_dim=16, num_heads=6, num_kv_heads=1, page_size=32, dtype=dtype)
    check(step, functools.partial(triton_attention.paged_attention, deterministic=deterministic))


@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size"), [((4, 4), 64, 1), ((20, 1), 16, 5), ((12, 2), 128, 64)], ids=str
)
def test_heads_and_pages(triton_attention: ModuleType, heads: tuple[int, int], head_dim: int, page_size: int) -> None:
    """More heads in a group than the lowest tile has rows, as well as one; pages larger and smaller than a block."""
    step = make_step([(0, 7), (70, 1)], page_size, *heads, head_dim=head_dim, dtype=torch.bfloat16)
    check(step, triton_attention.paged_attention)


@pytest.mark.parametrize("cap", [0.5, 60.0, 1000.0])
def test_caps_from_tiny_to_none(triton_attention: ModuleType, cap: float) -> None:
    """High ones need a running maximum, across splits too."""
    step = make_step([(0, 20), (130, 1)], head_dim=16, num_heads=2, num_kv_heads=1)
    step.cap = cap
    step.q_THd *= 4
    error = (step.run(triton_attention.paged_attention) - step.expected()).abs().max()
    assert error <= max(1e-5, cap * 1e-6)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_all_scores_at_one_end_of_the_cap(triton_attention: ModuleType, sign: float) -> None:
    step = make_step([(0, 20), (50, 1)], head_dim=16)
    step.q_THd.fill_(sign * 100)
    step.k_KPSd.masked_fill_(~step.k_KPSd.isnan(), 100.0)
    check(step, triton_attention.paged_attention)


@pytest.mark.parametrize("cap", [30.0, 1000.0])
def test_deterministic_rows_do_not_depend_on_their_company(triton_attention: ModuleType, cap: float) -> None:
    """A row of a chunk has the bits that it has alone: whatever the tile, and where its keys were split."""
    step = make_step([(120, 12), (0, 3)], head_dim=16, num_heads=6, num_kv_heads=1, dtype=torch.bfloat16)
    step.cap = cap
    kernel = functools.partial(triton_attention.paged_attention, deterministic=True)
    whole = step.run(kernel)
    pages = step.batch.chunks[0].page_ids
    for row in (0, 7, 8, 11):  # the eighth is the last that ends within two splits
        alone = StepBatch.build([SequenceChunk((1,), 120 + row, pages)], 16)
        part = Step(step.q_THd[row : row + 1], step.k_KPSd, step.v_KPSd, alone, cap).run(kernel)
        assert torch.equal(part[0], whole[row]), row


def test_a_bad_row_spoils_no_other(triton_attention: ModuleType) -> None:
    step = make_step([(0, 20), (130, 1)], head_dim=16, num_heads=2, num_kv_heads=1)
    step.q_THd[3, 1, 5] = math.nan
    out = step.run(triton_attention.paged_attention)
    assert out[3, 1].isnan().all()
    out[3, 1] = 0.0
    expected = step.expected()
    expected[3, 1] = 0.0
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_sequences_share_prefix_pages(triton_attention: ModuleType) -> None:
    step = make_step([(0, 64), (0, 96)], canaries=False, head_dim=16)
    long = step.batch.chunks[1]
    chunks = [
        SequenceChunk((1,), 31, long.page_ids[:2]),
        SequenceChunk((1,) * 5, 64, (*long.page_ids[:4], *step.batch.chunks[0].page_ids[:2])),
    ]
    batch = StepBatch.build(chunks, 16)
    check(Step(step.q_THd[: len(batch.slots_T)], step.k_KPSd, step.v_KPSd, batch), triton_attention.paged_attention)


def test_keys_and_values_in_eight_bits(triton_attention: ModuleType) -> None:
    """The twin on what the cache holds, times its scales."""
    step = make_step([(0, 20), (130, 1)], head_dim=16, dtype=torch.bfloat16, canaries=False)
    scales = triton_attention.KVScales(k=1 / 64, v=1 / 32)
    k8, v8 = ((x.float() / s).to(torch.float8_e4m3fn) for x, s in zip((step.k_KPSd, step.v_KPSd), scales, strict=True))
    out = triton_attention.paged_attention(step.q_THd, k8, v8, step.batch, 0.25, 30.0, scales=scales)
    wide = Step(step.q_THd, k8.float() * scales.k, v8.float() * scales.v, step.batch)
    error = out.float() - wide.expected()
    assert error.square().mean().sqrt() <= 4e-3 * wide.expected().square().mean().sqrt()


def test_empty_batch(triton_attention: ModuleType) -> None:
    cache = torch.full((2, 4, 16, 32), math.nan)
    step = Step(torch.empty(0, 8, 32), cache, cache, StepBatch.build([], 16))
    assert step.run(triton_attention.paged_attention).shape == (0, 8, 32)


def test_page_outside_the_cache_is_refused(triton_attention: ModuleType) -> None:
    cache = torch.zeros(2, 4, 16, 32)
    batch = StepBatch.build([SequenceChunk((1,), 0, (4,))], 16)
    with pytest.raises(IndexError, match="page 4"):
        Step(torch.zeros(1, 8, 32), cache, cache, batch).run(triton_attention.paged_attention)


def test_a_head_size_that_no_tile_has_is_refused(triton_attention: ModuleType) -> None:
    with pytest.raises(AssertionError, match="power of two"):
        make_step([(0, 1)], head_dim=48).run(triton_attention.paged_attention)
