"""Compiled loops: numbers, threads, and finding them again."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grokmoe import native
from grokmoe.native import cache, team


@native.loop(grain=4)
def _copy(element: Any) -> Any:
    @native.entry
    def run(params: Any) -> None:
        x = native.array(np.float32, params[1], (params[0], 1))
        out = native.array(element, params[2], (params[0], 1))
        first, end = native.share(params[0])
        for row in range(first, end):
            native.put(out, row, 0, x[row, 0])

    return run


@native.loop(grain=4)
def _powers(element: Any) -> Any:
    @native.entry
    def run(params: Any) -> None:
        x = native.array(element, params[1], (params[0],))
        for row in range(params[0]):
            x[row] = native.exp2(native.clamped(native.wide(x[row]), np.float32(-126.0), np.float32(126.0)))

    return run


def test_bfloat16_is_rounded_as_torch_does() -> None:
    bits = torch.arange(-(2**31), 2**31, 2**16 + 1, dtype=torch.int64).to(torch.int32)
    halves = (torch.arange(2**15, dtype=torch.int32) << 16) + 0x8000
    x = torch.cat([bits, halves, -halves]).view(torch.float32)
    out = torch.empty(len(x), dtype=torch.bfloat16)
    _copy(torch.bfloat16, len(x), x, out)
    expected = x.to(torch.bfloat16)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(0.0), expected.nan_to_num(0.0))


def test_powers_of_two() -> None:
    x = torch.cat([torch.linspace(-126, 126, 100001), torch.tensor([-1e9, 1e9, 0.5, -0.5])])
    out = x.clone()
    _powers(torch.float32, len(x), out)
    expected = x.double().clamp(-126, 126).exp2()
    assert ((out.double() - expected) / expected).abs().max() < 3e-7
    bad = torch.tensor([math.nan])
    _powers(torch.float32, 1, bad)
    assert bad.isnan().all()


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 1001])
def test_every_row_is_done_once_by_any_number_of_threads(size: int, num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        x, out = torch.randn(size), torch.full((size + 1,), 7.0)
        _copy(torch.float32, size, x, out)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out[:-1], x)
    assert out[-1] == 7.0


@pytest.mark.skipif(not hasattr(team._library(), "GOMP_parallel"), reason="torch uses no GNU OpenMP here")
def test_threads_are_those_of_torch() -> None:
    """No further library is loaded: its idle team would slow every product down."""

    def libraries() -> set[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line.split()[-1] for line in lines if "libgomp" in line}

    before = libraries()
    _copy(torch.float32, 1000, torch.randn(1000), torch.empty(1000))
    assert libraries() == before
    assert team.num_threads() == torch.get_num_threads()


@native.loop(grain=1)
def _places(element: Any) -> Any:
    @native.entry
    def run(params: Any) -> None:
        out = native.array(np.float32, params[1], (params[0],))
        first, end = native.share(params[0])
        out[first] = np.float32(end - first)

    return run


@pytest.mark.skipif(not hasattr(team._library(), "GOMP_parallel"), reason="torch uses no GNU OpenMP here")
def test_so_many_threads_take_part() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        out = torch.zeros(10)
        _places(torch.float32, 10, out)
    finally:
        torch.set_num_threads(before)
    assert out.tolist() == [3.0, 0, 0, 3.0, 0, 0, 4.0, 0, 0, 0]


PROGRAM = """
import torch
from attention_worker.kernels import cpu_norm
cpu_norm.norm(torch.ones(3, 8), torch.ones(8), 1e-5, torch.float32)
"""


def test_the_next_process_finds_what_was_compiled(tmp_path: Path) -> None:
    environment = os.environ | {cache.FOLDER_VARIABLE: str(tmp_path), "NUMBA_DEBUG_CACHE": "1"}

    def run() -> str:
        return subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, check=True, capture_output=True, text=True
        ).stdout

    first, second = run(), run()
    assert "data saved" in first
    assert "data loaded" in second
    assert "data saved" not in second


def test_a_folder_that_cannot_be_written_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv(cache.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert str(tmp_path) not in cache.cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder().startswith(str(tmp_path))
