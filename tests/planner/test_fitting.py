"""Costs come back from steps that were made with them."""

from __future__ import annotations

import dataclasses
import json
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokmoe.errors import ConfigError
from grokmoe.model_config import TINY
from planner.attention_time import attend_seconds, products_seconds, rows_seconds
from planner.cluster import SharedHost
from planner.costs import ASSUMED, Costs
from planner.costs_file import read_costs, write_costs
from planner.device import Device
from planner.fitting import fit, predict
from planner.log_fit import fit_logs
from planner.measured import Observation, read_result, read_steps, shapes_of
from planner.shape import StepShape, decode, prefill

HOST = Device(
    name="host",
    kind="cpu",
    memory=16,
    bandwidth=2e10,
    flops={"bfloat16": 4e11},
    price=0.0,
    cores=2,
    caches=((1e6, 1e11), (1e8, 4e10), (1e9, 2e10)),
    cold=1.7,
)

LARGE = dataclasses.replace(TINY, hidden_size=1024, intermediate_size=4096, num_layers=8, context_length=8192)

TRUTH = dataclasses.replace(
    ASSUMED,
    attention={
        "cpu": dataclasses.replace(
            ASSUMED.attention["cpu"], per_product=60e-6, per_layer=20e-6, per_sequence=50e-6, per_score=1e-9, flops=0.6
        )
    },
    experts={"cpu": dataclasses.replace(ASSUMED.experts["cpu"], per_layer=400e-6, per_expert=2e-6, bandwidth=0.95)},
    router=dataclasses.replace(ASSUMED.router, per_layer=30e-6, per_message=500e-6, per_byte=2e-9, per_request=4e-3),
    round_trip=50e-6,
)
"""Other figures than those that are assumed, by up to five times."""

LEGS = {"gate": ("router",), "wire": ("messages", "wire"), "expert": ("experts",)}


def observed(costs: Costs, configs=(TINY, LARGE)) -> list[Observation]:
    """What would be measured of a cluster with these costs."""
    found = []
    for config in configs:
        for workers in (0, 1, 2, 4):
            for shape in (decode(1, 50), decode(16, 50), decode(16, 200), prefill(200), prefill(50)):
                empty = Observation("", config, HOST, workers, ((1.0, shape),), {}, 0.0, requests=int(shape.draws == 1))
                told, cost = predict(empty, costs), costs.attention["cpu"]
                legs = {leg: sum(told[part] for part in parts) for leg, parts in LEGS.items()}
                for leg, part in (("qkv", products_seconds), ("attention", attend_seconds), ("norm", rows_seconds)):
                    legs[leg] = part(empty.cluster, cost, shape)
                found.append(dataclasses.replace(empty, legs=legs, step=told["all"]))
    return found


def errors(observations: list[Observation], costs: Costs) -> list[float]:
    return [abs(predict(each, costs)["all"] / each.step - 1) for each in observations]


def test_costs_are_found_again() -> None:
    observations = observed(TRUTH)
    fitted = fit(observations, "fitted")
    assert fitted.origin == "fitted"
    assert max(errors(observations, ASSUMED)) > 0.5
    assert max(errors(observations, fitted)) < 0.03
    for name in ("per_layer", "per_message", "per_byte", "per_request"):
        assert getattr(fitted.router, name) == pytest.approx(getattr(TRUTH.router, name), rel=0.1), name
    assert fitted.experts["cpu"].per_layer == pytest.approx(400e-6, rel=0.1)
    assert fitted.attention["cpu"].per_product == pytest.approx(60e-6, rel=0.1)


@pytest.mark.parametrize(("known", "other"), [(TINY, LARGE), (LARGE, TINY)], ids=["upwards", "downwards"])
def test_one_size_predicts_another(known, other) -> None:
    """Two hundred times the weights: costs are of the machine, sizes of the model."""
    fitted = fit(observed(TRUTH, [known]), "")
    assert max(errors(observed(TRUTH, [other]), fitted)) < 0.35
    assert statistics.median(errors(observed(TRUTH, [other]), fitted)) < 0.12


def test_what_nothing_was_measured_of_stays_as_assumed() -> None:
    fitted = fit([each for each in observed(TRUTH) if not each.expert_workers], "")
    assert fitted.router.per_message == ASSUMED.router.per_message
    assert fitted.round_trip == ASSUMED.round_trip


def test_a_measurement_that_scattered_counts_less() -> None:
    observations = observed(TRUTH)
    broken = dataclasses.replace(observations[7], legs=dict.fromkeys(observations[7].legs, 1.0))
    beside = [each for each in observations if each is not observations[7]]
    trusted = fit([*beside, broken], "")
    doubted = fit([*beside, dataclasses.replace(broken, spread=100.0)], "")
    assert statistics.mean(errors(beside, doubted)) < 0.5 * statistics.mean(errors(beside, trusted))


def test_nothing_cannot_be_fitted() -> None:
    with pytest.raises(ConfigError, match="nothing"):
        fit([], "")


@given(st.lists(st.floats(1e-3, 10), min_size=2, max_size=3), st.integers(0, 1000))
def test_figures_come_back_from_what_they_make(figures, seed) -> None:
    names = ["a", "b", "c"][: len(figures)]
    features = np.random.default_rng(seed).uniform(0.1, 1.0, (12, len(names)))

    def model(values):
        return features @ np.array([values[name] for name in names])

    target = model(dict(zip(names, figures, strict=True)))
    found = fit_logs(model, target, dict.fromkeys(names, 1.0), dict.fromkeys(names, 100.0), np.ones(12))
    assert all(value > 0 for value in found.values())
    assert model(found) == pytest.approx(target, rel=0.1)


def test_a_figure_that_nothing_depends_on_stays() -> None:
    found = fit_logs(
        lambda values: np.array([values["a"], 2 * values["a"]]),
        np.array([3.0, 6.0]),
        {"a": 1.0, "b": 5.0},
        {"a": 100.0, "b": 100.0},
        np.ones(2),
    )
    assert found["b"] == pytest.approx(5.0)
    assert found["a"] == pytest.approx(3.0, rel=0.01)


def test_targets_of_nothing_do_not_count() -> None:
    found = fit_logs(lambda values: np.full(2, values["a"]), np.array([0.0, 2.0]), {"a": 1.0}, {"a": 100.0}, np.ones(2))
    assert found["a"] == pytest.approx(2.0, rel=0.01)


def test_costs_are_read_as_they_were_written(tmp_path) -> None:
    write_costs(tmp_path / "costs.json", ASSUMED)
    assert read_costs(tmp_path / "costs.json") == ASSUMED
    (tmp_path / "costs.json").write_text("{}")
    with pytest.raises(ConfigError, match="costs"):
        read_costs(tmp_path / "costs.json")


def test_the_steps_of_a_benchmark() -> None:
    assert shapes_of(1, 512, 1) == ((1.0, StepShape(512, 1, 1, 512 * 513 / 2, 512)),)
    assert shapes_of(8, 32, 48) == ((1.0, StepShape(8, 8, 8, 8 * 56, 8 * 56)),)
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
    limits = {"bandwidth": [[1e6, 2e11], [5e8, 3e10]], "flops": 9e11, "cold": 1.5}
    told = {"benchmark": "step", "rows": listed, "threads": 2, "limits": {row[0]: limits for row in rows}}
    return "a table\n" + json.dumps(told) + "\n"


def test_reading_what_the_step_benchmark_writes(tmp_path) -> None:
    path = tmp_path / "step.txt"
    path.write_text(step_output(("fused", "decode 1", 1), ("split 4", "decode 8", 8)))
    fused, split = read_steps(path, LARGE)
    assert (fused.expert_workers, split.expert_workers) == (0, 4)
    assert split.shapes == ((1.0, decode(8, 160)),)
    assert (split.step, split.leg("attention"), split.other) == pytest.approx((5e-3, 2e-3, 2e-3))
    assert (split.device.bandwidth, split.device.cores, split.device.cold) == (3e10, 2, 1.5)
    assert split.device.read_rate(1e6) == pytest.approx(2e11)
    assert (split.cluster.host, fused.cluster.host) == (SharedHost(2, 1), None), "four workers, two cores"
    assert fused.cluster.is_fused
    for text in ("", "[]", '{"rows": [{}]}', step_output(("split", "decode 1", 1))):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not what benchmarks"):
            read_steps(path, LARGE)


def test_legs_that_a_router_reports_in_parts_are_summed() -> None:
    legs = {"qkv": 1.0, "attention": 2.0, "head": 3.0, "attention_wire": 4.0, "wire": 5.0, "plan": 6.0}
    found = Observation("", TINY, HOST, 2, (), legs, 25.0)
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
    found = read_result(path, TINY, HOST, 2)
    assert found.shapes == ((1.0, StepShape(12, 5, 5, 12 * 95.0, 5 * 95.0)),)
    assert (found.step, found.leg("attention")) == (0.02, 0.005)
    path.write_text(json.dumps({**result, "server_metrics": {}}))
    with pytest.raises(ConfigError, match="metrics"):
        read_result(path, TINY, HOST, 2)
