"""From runs of a load to a cell of the tables."""

from __future__ import annotations

import pytest

from benchmarks.step.loads import Load, Measured, loads
from benchmarks.step.report import Cell
from grokmoe.model_config import BENCH

LOAD = Load("decode 2", 2, 128, 64)


def run(seconds: float, gate: float, expert: float) -> Measured:
    return Measured(seconds, {"gate": gate, "expert": expert}, 60, 2 / seconds)


def test_a_cell_has_medians_and_what_no_leg_accounts_for() -> None:
    runs = [run(0.010, 0.001, 0.006), run(0.012, 0.001, 0.007), run(0.090, 0.002, 0.030)]
    cell = Cell.of(LOAD, "fused", runs, {"expert": 0.004})
    assert cell.legs == {"gate": 0.001, "expert": 0.007, "other": pytest.approx(0.004)}
    assert cell.seconds == 0.012
    assert cell.as_json()["floor_ms"] == pytest.approx(4.0)
    assert cell.as_json()["legs"] == {
        "gate": {"ms": pytest.approx(1.0)},
        "expert": {"ms": pytest.approx(7.0), "floor_ms": pytest.approx(4.0)},
        "other": {"ms": pytest.approx(4.0)},
    }


def test_loads_are_prefills_of_one_token_and_decodes() -> None:
    wanted = loads([1, 8], [512, 8192], 128, 64)
    assert [load.is_prefill for load in wanted] == [True, True, False, False]
    assert [load.fits(BENCH) for load in wanted] == [True, False, True, True]
