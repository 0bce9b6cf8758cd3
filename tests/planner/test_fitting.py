"""Costs come back from steps that were made with them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokmoe.errors import ConfigError
from grokmoe.model_config import TINY
from planner.costs import ASSUMED, Costs, Efficiency
from planner.costs_file import read_costs, write_costs
from planner.device import Device
from planner.fitting import SHARES, fit, nonnegative, predict
from planner.measured import Observation, read_result, read_steps, shapes_of
from planner.shape import StepShape, decode

HOST = Device(name="host", kind="cpu", memory=16, bandwidth=2e10, flops={"bfloat16": 4e11}, price=0.0)
LINK = 1e10

LARGE = dataclasses.replace(TINY, hidden_size=1024, intermediate_size=4096, num_layers=8, context_length=8192)

TRUTH = Costs(
    attention={"cpu": Efficiency(per_layer=1e-3, per_row=6e-6, bandwidth=SHARES[9], flops=SHARES[12])},
    experts={"cpu": Efficiency(per_layer=7e-4, per_row=4e-6, bandwidth=SHARES[11], flops=SHARES[10])},
    per_message=8e-4,
    round_trip=3e-4,
    link=0.1,
    per_router_layer=2e-4,
    per_router_row=1e-6,
    per_step=1e-3,
    per_draw=5e-5,
    origin="the truth",
)


def observed(costs: Costs) -> list[Observation]:
    """What would be measured of a cluster with these costs."""
    found = []
    for config in (TINY, LARGE):
        for workers in (1, 4):
            for rows, draws in ((1, 1), (16, 16), (512, 1)):
                shapes = ((1.0, StepShape(rows, draws, rows * 50.0, draws * 50.0)),)
                empty = Observation("", config, workers, shapes, {}, 0.0)
                legs = predict(empty, HOST, LINK, costs)
                named = {
                    "attention": legs["attention"],
                    "gate": legs["router"],
                    "wire": legs["messages"] + legs["wire"],
                    "expert": legs["experts"],
                }
                found.append(dataclasses.replace(empty, legs=named, step=legs["all"]))
    return found


def test_costs_are_found_again() -> None:
    observations = observed(TRUTH)
    fitted = fit(observations, HOST, LINK, "fitted")
    for name in ("per_message", "round_trip", "link", "per_router_layer", "per_router_row", "per_step", "per_draw"):
        assert getattr(fitted, name) == pytest.approx(getattr(TRUTH, name), rel=1e-3), name
    assert fitted.origin == "fitted"
    for each in observations:
        assert predict(each, HOST, LINK, fitted)["all"] == pytest.approx(each.step, rel=0.02)
    assert fitted.experts["cpu"].bandwidth == TRUTH.experts["cpu"].bandwidth
    assert fitted.experts["cpu"].per_layer == pytest.approx(7e-4, rel=1e-3)


def test_nothing_cannot_be_fitted() -> None:
    with pytest.raises(ConfigError, match="nothing"):
        fit([], HOST, LINK, "")


@given(st.lists(st.just(0.0) | st.floats(1e-3, 10), min_size=2, max_size=3), st.integers(0, 1000))
def test_nonnegative_finds_what_was_put_in(coefficients, seed) -> None:
    features = np.random.default_rng(seed).uniform(0.1, 1.0, (12, len(coefficients)))
    target = features @ np.array(coefficients)
    found = nonnegative(features, target)
    assert (found >= 0).all()
    assert features @ found == pytest.approx(target, rel=1e-6, abs=1e-9)


def test_nonnegative_takes_nothing_rather_than_a_negative() -> None:
    features = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert nonnegative(features, np.array([3.0, 2.0, 1.0]))[1] == 0


def test_costs_are_read_as_they_were_written(tmp_path) -> None:
    write_costs(tmp_path / "costs.json", ASSUMED)
    assert read_costs(tmp_path / "costs.json") == ASSUMED
    (tmp_path / "costs.json").write_text("{}")
    with pytest.raises(ConfigError, match="costs"):
        read_costs(tmp_path / "costs.json")


def test_the_steps_of_a_benchmark() -> None:
    assert shapes_of(1, 512, 1) == ((1.0, StepShape(512, 1, 512 * 513 / 2, 512)),)
    assert shapes_of(8, 32, 48) == ((1.0, StepShape(8, 8, 8 * 56, 8 * 56)),)
    long = shapes_of(1, 1200, 1)
    assert [(count, shape.rows, shape.draws, shape.read) for count, shape in long] == [
        (1.0, 512, 0, 512),
        (1.0, 512, 0, 1024),
        (1.0, 176, 1, 1200),
    ]


def step_output(*rows: tuple[str, str, int]) -> str:
    """As benchmarks/step ends. rows: topology, name, batch."""
    legs = {"attention": {"ms": 2.0, "floor_ms": 1.0}, "wire": {"ms": 1.0}, "other": {"ms": 2.0}}
    fixed = {"prompt": 128, "new": 64, "ms": 5.0, "legs": legs}
    listed = [{"topology": topology, "name": name, "batch": batch, **fixed} for topology, name, batch in rows]
    return "a table\n" + json.dumps({"benchmark": "step", "rows": listed}) + "\n"


def test_reading_what_the_step_benchmark_writes(tmp_path) -> None:
    path = tmp_path / "step.txt"
    path.write_text(step_output(("fused", "decode 1", 1), ("split 4", "decode 8", 8)))
    fused, split = read_steps(path, LARGE)
    assert (fused.expert_workers, split.expert_workers) == (0, 4)
    assert split.shapes == ((1.0, decode(8, 160)),)
    assert (split.step, split.leg("attention"), split.other) == pytest.approx((5e-3, 2e-3, 2e-3))
    for text in ("", "[]", '{"rows": [{}]}', step_output(("split", "decode 1", 1))):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not what benchmarks"):
            read_steps(path, LARGE)


def test_legs_that_a_router_reports_in_parts_are_summed() -> None:
    legs = {"qkv": 1.0, "attention": 2.0, "head": 3.0, "attention_wire": 4.0, "wire": 5.0, "plan": 6.0}
    found = Observation("", TINY, 2, (), legs, 25.0)
    assert found.other == 10.0


def test_reading_a_load_tests_result(tmp_path) -> None:
    histograms = {
        "grokmoe_step_seconds": {"count": 100, "mean": 0.02},
        "grokmoe_step_tokens": {"count": 100, "mean": 12.0},
        'grokmoe_leg_seconds{leg="attention"}': {"count": 100, "mean": 0.005},
    }
    result = {
        "server_metrics": {"endpoints": {"w": {}, "r": {"histograms": histograms}}},
        "duration": 10.0,
        "completed": 10,
        "output_throughput": 50.0,
        "total_input_tokens": 700,
        "total_output_tokens": 500,
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    found = read_result(path, TINY, 2)
    assert found.shapes == ((1.0, StepShape(12, 5, 12 * 95.0, 5 * 95.0)),)
    assert (found.step, found.leg("attention")) == (0.02, 0.005)
    path.write_text(json.dumps({**result, "server_metrics": {}}))
    with pytest.raises(ConfigError, match="metrics"):
        read_result(path, TINY, 2)
