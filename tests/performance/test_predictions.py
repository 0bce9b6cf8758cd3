"""The planner against what was measured: the table of docs/scaling.md is of the program, and says what it should."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks.predictions.cases import Case, Outcome, Prediction, cases, run
from benchmarks.predictions.configurations import LANES, STEPS, Topology, loads_of, topologies, traffics_of
from benchmarks.predictions.measurements import Conditions, Measured, Steps, read, write
from benchmarks.predictions.report import BEGIN, END, changed
from benchmarks.step.loads import Load

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "benchmarks" / "predictions" / "measured.json"
PAGE = ROOT / "docs" / "scaling.md"


@pytest.fixture(scope="module")
def measured() -> Measured:
    return read(FILE).undisturbed


@pytest.fixture(scope="module")
def upwards(measured) -> Outcome:
    """The largest model from the two smaller ones: what a plan does."""
    (case,) = [each for each in cases() if each.name == "small and middle"]
    outcome = run(case, measured)
    assert outcome is not None
    return outcome


def test_a_model_of_another_size_is_predicted(upwards) -> None:
    number, median, _, largest = upwards.summary("steps")
    assert number >= 12
    assert {each.model for each in upwards.steps} >= {"large"}
    assert median < 0.25
    assert largest < 0.75
    _, median, _, _ = upwards.summary("traffic")
    assert median < 0.25


def test_the_page_has_what_the_program_says(upwards) -> None:
    text = PAGE.read_text()
    table = text[text.index("Fitted to small and middle:") : text.index("Fitted to two workers, one lane:")]
    rows = [re.split(r" \| ", line.strip("| ")) for line in table.splitlines() if line.startswith("| ")][2:]
    told = {tuple(row[:3]): row[3:5] for row in rows}
    assert len(told) == len(rows)
    for each in (*upwards.steps, *upwards.traffic):
        seen, predicted = map(float, told.pop((each.model, each.topology, each.load)))
        assert seen == pytest.approx(each.measured, rel=0.01)
        # Another processor's logarithms, or another numpy's, may end a fit a little elsewhere.
        assert predicted == pytest.approx(each.predicted, rel=0.05)
    assert told == {}


def test_what_was_fitted_to_is_not_predicted(measured) -> None:
    alone = run(Case("", lambda each: each.model == "small"), measured)
    assert alone is not None
    assert {each.model for each in alone.traffic} == {"middle", "large"}
    assert {each.topology for each in alone.steps if each.model == "small"} == {"2 workers, 2 lanes"}, "lanes are never"
    assert run(Case("", lambda each: False), measured) is None


def test_every_topology_has_loads() -> None:
    asked = topologies()
    assert len(asked) == len(set(asked)) == 18
    assert all(bool(loads_of(each)) != bool(traffics_of(each)) for each in asked)
    assert loads_of(Topology("small", 2)) == STEPS
    assert loads_of(Topology("small", 2, lanes=2)) == LANES


def steps(topology: Topology, seconds: float, foreign: float = 0.0) -> Steps:
    conditions = Conditions({"flops": 1e12}, 2, foreign, "2026-01-01", "here")
    return Steps(topology, Load("decode 1", 1, 8, 4), seconds, {"expert": 1.0}, 1.1, conditions)


def test_measurements_come_back_and_are_replaced_by_topology(tmp_path) -> None:
    one, other = Topology("small", 1), Topology("small", 2)
    old = Measured((steps(one, 1.0, foreign=0.3), steps(other, 2.0)))
    assert old.undisturbed.topologies == {other}
    new = old.with_new(Measured((steps(one, 3.0),)))
    write(tmp_path / "m.json", new)
    assert read(tmp_path / "m.json") == new
    assert {each.topology: each.seconds for each in new.steps} == {one: 3.0, other: 2.0}
    assert read(tmp_path / "none.json") == Measured()


def test_errors_are_summed_up() -> None:
    made = tuple(Prediction("m", "t", "l", 100.0, 100.0 + error) for error in (-50, 10, 0, 20, 40))
    outcome = Outcome(Case("c", lambda each: True), 3, made, made[:1])
    number, median, p90, largest = outcome.summary("steps")
    assert (number, median, largest) == (5, pytest.approx(0.2), pytest.approx(0.5))
    assert p90 == pytest.approx(0.46)
    assert outcome.summary("traffic") == (1, 0.5, 0.5, 0.5)
    assert dataclasses.replace(outcome, traffic=()).summary("traffic") == (0, 0.0, 0.0, 0.0)


def test_only_what_is_between_the_marks_changes() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter"
    assert changed(page, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter"
    with pytest.raises(AssertionError, match="no marks"):
        changed("nothing", "new")
