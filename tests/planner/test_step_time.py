"""A step, leg by leg, against figures worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.costs import ASSUMED, Efficiency
from planner.experts_time import distinct_experts, draw_rows
from planner.shape import StepShape, decode, of_chunks, prefill
from planner.step_time import StepTimer
from tests.planner.worked import CONFIG, DEVICE, IDEAL, cluster

EXPERT_READ = 3 * 100 * 200 * 2 / 1e9
"""Seconds in which a card reads one expert of one layer."""


def test_shapes() -> None:
    assert of_chunks([(0, 4, False), (9, 10, True)]) == StepShape(5, 1, 1 + 2 + 3 + 4 + 10, 4 + 10)
    assert prefill(4) == StepShape(4, 1, 10, 4)
    assert decode(3, 50) == StepShape(3, 3, 150, 150)


def test_attention_reads_weights_pages_and_head() -> None:
    time = StepTimer(cluster(), IDEAL).time(decode(1, 1000))
    projections = 4 * 100 * 2 * (120 + 60) * 2
    pages = 1000 * 2 * 4 * 60 * 2
    head = 1000 * 100 * 2
    assert time.seconds["attention"] == pytest.approx((projections + pages + head) / 1e9)


def test_a_large_prefill_is_bound_by_products() -> None:
    slow = dataclasses.replace(DEVICE, flops={"bfloat16": 1e6})
    shape = prefill(100)
    time = StepTimer(cluster(attention=slow), IDEAL).time(shape)
    products = 2 * 4 * 100 * 2 * 180 * 100 + 4 * 4 * 120 * shape.attended + 2 * 1000 * 100
    assert time.seconds["attention"] == pytest.approx(products / 1e6)


def test_one_token_needs_two_experts_at_once() -> None:
    """Each on a card of its own: the step takes as long as one; on one card, as two."""
    apart, together = StepTimer(cluster(4), IDEAL), StepTimer(cluster(1), IDEAL)
    assert apart.time(decode(1, 1)).seconds["experts"] == pytest.approx(4 * EXPERT_READ)
    assert together.time(decode(1, 1)).seconds["experts"] == pytest.approx(4 * 2 * EXPERT_READ)
    assert apart.experts(1).workers == 2
    assert together.experts(1).workers == 1


def test_many_tokens_need_all_experts() -> None:
    time = StepTimer(cluster(2), IDEAL).time(decode(200, 1))
    assert time.seconds["experts"] == pytest.approx(4 * 2 * EXPERT_READ)


def test_rows_beyond_the_ridge_cost_products() -> None:
    slow = dataclasses.replace(DEVICE, flops={"bfloat16": 1e9})
    time = StepTimer(cluster(1, slow), IDEAL).time(decode(500, 1))
    assert time.seconds["experts"] == pytest.approx(4 * 500 * 2 * 2 * 3 * 100 * 200 / 1e9)


def test_workers_that_share_a_device_take_as_long_as_one_that_has_it() -> None:
    rows = decode(300, 1)
    alone = StepTimer(cluster(1), IDEAL).time(rows).seconds["experts"]
    shared = StepTimer(cluster(4, experts_share=4), IDEAL).time(rows).seconds["experts"]
    assert shared == pytest.approx(alone)


def test_messages_wire_router_and_step() -> None:
    costs = dataclasses.replace(
        IDEAL,
        per_message=1.0,
        round_trip=10.0,
        per_router_layer=100.0,
        per_router_row=1000.0,
        per_step=7.0,
        per_draw=3.0,
    )
    seconds = StepTimer(cluster(4), costs).time(decode(2, 1)).seconds
    assert seconds["router"] == pytest.approx(4 * (100 + 2 * 1000))
    workers = StepTimer(cluster(4), costs).experts(2).workers
    assert seconds["messages"] == pytest.approx(4 * (1 + workers))
    crossing = 4 * 2 * (1 + 2) * 100 * 2 / 1e9
    assert seconds["wire"] == pytest.approx(4 * 2 * 10 + 2 * crossing)
    assert seconds["step"] == pytest.approx(7 + 2 * 3)
    fused = StepTimer(cluster(1, link=0.0), costs).time(decode(2, 1)).seconds
    assert fused["messages"] == fused["wire"] == 0


def test_per_layer_and_per_row() -> None:
    efficiency = Efficiency(per_layer=5.0, per_row=2.0, bandwidth=1e30, flops=1e30)
    costs = dataclasses.replace(IDEAL, attention={"cuda": efficiency}, experts={"cuda": efficiency})
    seconds = StepTimer(cluster(1), costs).time(decode(3, 1)).seconds
    assert seconds["attention"] == pytest.approx(4 * (5 + 3 * 2))
    assert seconds["experts"] == pytest.approx(4 * (5 + 3 * 2 * 2))


def test_steps_together_queue_where_it_is_busiest() -> None:
    timer = StepTimer(cluster(1, attention_workers=6, lanes=1), IDEAL)
    shape = decode(8, 1)
    time = timer.time(shape)
    assert timer.in_flight(shape, 1, 1) == time.alone
    assert timer.in_flight(shape, 1, 60) == pytest.approx(60 * time.busy_experts)
    assert timer.binding(shape, 1, 60) == "experts"
    copied = StepTimer(cluster(1, attention_workers=6, copies=3), IDEAL)
    assert copied.in_flight(shape, 1, 60) == pytest.approx(max(time.alone, 20 * time.busy_experts, 60 * time.busy_link))


@given(rows=st.integers(1, 300), more=st.integers(1, 50))
def test_no_step_gets_shorter_with_more_rows(rows, more) -> None:
    timer = StepTimer(cluster(1), ASSUMED)
    few, many = timer.time(decode(rows, 100)), timer.time(decode(rows + more, 100))
    # How many experts have rows is drawn; all else grows for certain.
    assert many.alone - many.seconds["experts"] >= few.alone - few.seconds["experts"] - 1e-12
    if rows >= 64:
        assert many.seconds["experts"] >= few.seconds["experts"] * 0.99


@given(rows=st.integers(1, 200), num_experts=st.integers(2, 8))
def test_draws_of_the_routing(rows, num_experts) -> None:
    top_k = min(2, num_experts)
    rows_SE = draw_rows(num_experts, top_k, rows)
    assert (rows_SE.sum(axis=1) == rows * top_k).all()
    if rows <= 64:
        assert rows_SE.max() <= rows, "no token has an expert twice"


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
def test_experts_touched_are_as_many_as_the_formula_says(rows) -> None:
    touched = (draw_rows(8, 2, rows) > 0).sum(axis=1).mean()
    assert touched == pytest.approx(distinct_experts(8, 2, rows), abs=0.35)


def test_the_worked_model_is_what_the_figures_above_take_it_for() -> None:
    assert (CONFIG.query_size, CONFIG.kv_size, CONFIG.num_layers) == (120, 60, 4)
