"""Corrections of low rank: the compiled loop and the Triton kernels, interpreted, against plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from attention_worker.device_kernels import CpuKernels, DeviceKernels, PlainKernels, TritonKernels
from attention_worker.kernels.low_rank import OUT, QKV, Projections, Segments
from attention_worker.lora.adapter import LowRank, table_of

DTYPES = [torch.float32, torch.bfloat16]
PLAIN = PlainKernels()
HIDDEN, QUERY, KEY = 200, 160, 48
"""Sizes that fill no block and no vector."""


def low_rank(rank: int, num_in: int, num_out: int, first_out: int, dtype: torch.dtype, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a_RI = torch.randn(rank, num_in, generator=generator) * num_in**-0.5
    b_RO = torch.randn(rank, num_out, generator=generator)
    return LowRank(a_RI.to(dtype), b_RO.to(dtype), 0.5 + seed % 3, first_out)


def adapter(ranks: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> tuple[LowRank | None, ...]:
    """One layer's parts; rank 0: absent."""
    sizes = ((HIDDEN, QUERY, 0), (HIDDEN, KEY, QUERY), (HIDDEN, KEY, QUERY + KEY), (QUERY, HIDDEN, 0))
    return tuple(
        low_rank(rank, *size, dtype, 10 * seed + at) if rank else None
        for at, (rank, size) in enumerate(zip(ranks, sizes, strict=True))
    )


def segments(rows: dict[int, list[int]], dtype: torch.dtype) -> Segments:
    """rows: of the step, by adapter."""
    kinds = {0: (16, 16, 16, 16), 1: (32, 0, 48, 16), 2: (0, 16, 0, 0)}
    parts = {which: (adapter(kinds[which], dtype, which),) for which in rows}
    return Segments(
        np.array([row for own in rows.values() for row in own], np.int64),
        tuple(map(len, rows.values())),
        tuple(parts.values()),
        np.stack([table_of(each) for each in parts.values()], axis=1),
    )


def tensors_of(found: Segments) -> list[torch.Tensor]:
    every = [part for layers in found.parts for layer in layers for part in layer if part is not None]
    return [tensor for part in every for tensor in (part.a_RI, part.b_RO)]


def product(num_rows: int, projections: Projections, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    num_in, num_out = (HIDDEN, QUERY + 2 * KEY) if projections is QKV else (QUERY, HIDDEN)
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randn(num_rows, num_out, generator=generator).to(dtype),
        torch.randn(num_rows, num_in, generator=generator).to(dtype),
    )


@pytest.fixture(params=["cpu", "triton"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


def run(kind: str, y_TO: torch.Tensor, x_TI: torch.Tensor, found: Segments, projections: Projections) -> torch.Tensor:
    y_TO = y_TO.clone()
    if kind == "triton":
        from tests.triton_interpreter import interpreted

        kernels: DeviceKernels = TritonKernels()
        with interpreted(tensors_of(found)):
            kernels.add_low_rank(y_TO, x_TI, found, 0, projections)
    else:
        CpuKernels().add_low_rank(y_TO, x_TI, found, 0, projections)
    return y_TO


ROWS = {0: [0, 5, 6, 19], 1: [*range(7, 19), 20, 21, *range(24, 40)], 2: [3]}
"""Four rows of 40 have no adapter; one adapter has more rows than a block."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("projections", [QKV, OUT])
def test_against_plain_torch(kind: str, projections: Projections, dtype: torch.dtype) -> None:
    found = segments(ROWS, dtype)
    y_TO, x_TI = product(40, projections, dtype)
    expected_TO = y_TO.clone()
    PLAIN.add_low_rank(expected_TO, x_TI, found, 0, projections)
    actual_TO = run(kind, y_TO, x_TI, found, projections)
    tolerance = 1e-5 if dtype is torch.float32 else 2**-6
    torch.testing.assert_close(actual_TO, expected_TO, rtol=tolerance, atol=tolerance)
    untouched = [1, 2, 4, 22, 23]
    assert torch.equal(actual_TO[untouched], y_TO[untouched])
    assert not torch.equal(actual_TO[[0, 7]], y_TO[[0, 7]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_bits_are_its_own(dtype: torch.dtype) -> None:
    """Alone, and beside others with the same adapter, with another one of a larger rank, and with none. Only of the
    loop: the interpreter's products are numpy's, whose bits depend on a row's place."""
    y_TO, x_TI = product(40, QKV, dtype)
    together_TO = run("cpu", y_TO, x_TI, segments(ROWS, dtype), QKV)
    for which, row in ((0, 6), (1, 12), (1, 39), (2, 3)):
        alone_TO = run("cpu", y_TO[row : row + 1], x_TI[row : row + 1], segments({which: [0]}, dtype), QKV)
        assert torch.equal(alone_TO[0], together_TO[row]), (which, row)


def test_what_is_no_number_stays_in_its_row(kind: str) -> None:
    y_TO, x_TI = product(8, QKV, torch.float32)
    x_TI[2, 5] = torch.nan
    actual_TO = run(kind, y_TO, x_TI, segments({0: [0, 2, 4]}, torch.float32), QKV)
    assert actual_TO[2].isnan().all()
    assert actual_TO[[0, 1, 3, 4]].isfinite().all()


def test_an_adapter_without_a_part_of_the_product(kind: str) -> None:
    """It changes nothing of it."""
    y_TO, x_TI = product(4, OUT, torch.float32)
    assert torch.equal(run(kind, y_TO, x_TI, segments({2: [0, 1]}, torch.float32), OUT), y_TO)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_the_number_of_threads_changes_no_bit() -> None:
    y_TO, x_TI = product(40, QKV, torch.bfloat16)
    found = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        found.append(run("cpu", y_TO, x_TI, segments(ROWS, torch.bfloat16), QKV))
    assert torch.equal(*found)
