"""Loops that are recorded: nothing is computed then, and the program computes what the loops would, again and again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from grokmoe import native
from grokmoe.recording import current, recorded


@native.loop(grain=1)
def _add(element: Any) -> Any:
    @native.entry
    def run(params: Any) -> None:
        size, out_N = params[0], native.array(np.float32, params[2], (params[0],))
        x_N = native.array(np.float32, params[1], (size,))
        first, end = native.share(size)
        for i in range(first, end):
            out_N[i] = x_N[i] + out_N[i]

    return run


@native.loop(grain=1)
def _count(element: Any) -> Any:
    """Every unit is taken once, by whichever thread."""

    @native.entry
    def run(params: Any) -> None:
        size, out_N = params[0], native.array(np.float32, params[2], (params[0],))
        unit = native.take(params, 1)
        while unit < size:
            out_N[unit] += np.float32(1.0)
            unit = native.take(params, 1)

    return run


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Any:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def test_a_recording_computes_nothing_and_its_program_everything(threads: int) -> None:
    x_N, sum_N = torch.arange(40.0), torch.zeros(40)
    with recorded() as recording:
        assert current() is recording
        _add(torch.float32, 40, x_N, sum_N)
        _add(torch.float32, 40, sum_N, sum_N)
    assert current() is None
    assert not sum_N.any()
    program = native.Program(recording)
    program.run()
    assert torch.equal(sum_N, 2 * x_N)
    program.run()
    assert torch.equal(sum_N, 6 * x_N)


def test_inputs_are_read_when_it_runs(threads: int) -> None:
    x_N, sum_N = torch.zeros(8), torch.zeros(8)
    with recorded() as recording:
        _add(torch.float32, 8, x_N, sum_N)
    program = native.Program(recording)
    for value in (1.0, 2.0):
        x_N.fill_(value)
        program.run()
    assert sum_N.tolist() == [3.0] * 8


def test_units_are_taken_anew_in_every_run(threads: int) -> None:
    counts_N = torch.zeros(100)
    with recorded() as recording:
        _count(torch.float32, 100, 0, counts_N)
        _count(torch.float32, 100, 0, counts_N)
    program = native.Program(recording)
    for number in range(1, 4):
        program.run()
        assert counts_N.tolist() == [2.0 * number] * 100


def test_laps_and_what_is_told_after() -> None:
    x_N, told = torch.ones(1000), []
    with recorded() as recording:
        _add(torch.float32, 1000, x_N, torch.zeros(1000))
        recording.lap("one")
        _add(torch.float32, 1000, x_N, torch.zeros(1000))
        recording.lap("two")
        recording.lap("nothing")
        recording.after.append(told.append)
    program = native.Program(recording)
    program.run(is_told=False)
    assert not told
    spent = program.run()
    assert told == [spent]
    assert spent.keys() == {"one", "two", "nothing"}
    assert spent["nothing"] == 0
    assert min(spent["one"], spent["two"]) > 0


def test_its_own_memory_is_what_nobody_else_holds() -> None:
    weights_N = torch.ones(1000)
    with recorded() as recording:
        _add(torch.float32, 1000, weights_N, torch.zeros(1000))
    assert native.Program(recording).num_bytes == 4000


def test_recordings_are_not_nested() -> None:
    with recorded(), pytest.raises(AssertionError, match="open"), recorded():
        pass
    assert current() is None
