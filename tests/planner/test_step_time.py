"""A step, leg by leg, against figures worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cluster import SharedHost
from planner.costs import ASSUMED, AttentionCosts, Costs, ExpertCosts, RouterCosts
from planner.experts_time import distinct_experts, draw_rows
from planner.shape import StepShape, decode, of_chunks, prefill
from planner.step_time import SHARED_MOST, StepTimer
from tests.planner.worked import CONFIG, DEVICE, IDEAL, cluster, nothing_but_roofs

EXPERT_READ = 3 * 100 * 200 * 2 / 1e9
"""Seconds in which a card reads one expert of one layer."""


def test_shapes() -> None:
    assert of_chunks([(0, 4, False), (9, 10, True)]) == StepShape(5, 2, 1, 1 + 2 + 3 + 4 + 10, 4 + 10)
    assert prefill(4) == StepShape(4, 1, 1, 10, 4)
    assert decode(3, 50) == StepShape(3, 3, 3, 150, 150)


def test_attention_reads_weights_pages_and_head() -> None:
    time = StepTimer(cluster(), IDEAL).time(decode(1, 1000))
    projections = 4 * 100 * 2 * (120 + 60) * 2
    pages = 1000 * 2 * 4 * 60 * 2
    head = 1000 * 100 * 2
    scores = 4 * 4 * 120 * 1000
    assert time.seconds["attention"] == pytest.approx((projections + pages + head) / 1e9 + scores / 1e12)


def test_a_large_prefill_is_bound_by_products() -> None:
    slow = dataclasses.replace(DEVICE, flops={"bfloat16": 1e6})
    shape = prefill(100)
    time = StepTimer(cluster(attention=slow), IDEAL).time(shape)
    products = 2 * 4 * 100 * 2 * 180 * 100 + 4 * 4 * 120 * shape.attended + 2 * 1000 * 100
    pages = 100 * 2 * 4 * 60 * 2
    assert time.seconds["attention"] == pytest.approx(products / 1e6 + pages / 1e9)


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


def test_few_rows_take_as_long_as_a_tile() -> None:
    slow = dataclasses.replace(DEVICE, flops={"bfloat16": 1e9})
    costs = dataclasses.replace(IDEAL, experts={"cuda": nothing_but_roofs(ExpertCosts, tile_rows=50.0)})
    one, all_of_it = (StepTimer(cluster(4, slow), costs).time(decode(rows, 1)).seconds["experts"] for rows in (1, 20))
    assert one == pytest.approx(4 * 50 * 2 * 3 * 100 * 200 / 1e9)
    assert all_of_it == pytest.approx(one), "20 rows over four experts are fewer than a tile each"


HOST = dataclasses.replace(DEVICE, kind="cpu", cores=4)


def on_one_host(num_workers: int, threads: int, flops: float = 1e12) -> StepTimer:
    device = dataclasses.replace(HOST, flops={"bfloat16": flops})
    costs = dataclasses.replace(IDEAL, experts={"cpu": IDEAL.experts["cuda"]})
    return StepTimer(cluster(num_workers, device, host=SharedHost(4, threads)), costs)


def test_workers_of_one_host_share_its_memory() -> None:
    """All four experts are read at its bandwidth, however many workers read them."""
    for num_workers in (1, 2, 4):
        assert on_one_host(num_workers, 4 // num_workers).experts(200).seconds == pytest.approx(4 * 4 * EXPERT_READ)


def test_workers_of_one_host_have_its_cores_between_them() -> None:
    """Products of one worker with one of four cores take four times as long; of four such workers together, once."""
    products = 4 * 300 * 2 * 2 * 3 * 100 * 200 / 1e9
    assert on_one_host(1, 4, 1e9).experts(300).seconds == pytest.approx(products)
    assert on_one_host(1, 1, 1e9).experts(300).seconds == pytest.approx(4 * products)
    assert on_one_host(4, 1, 1e9).experts(300).seconds == pytest.approx(products, rel=0.15), "but for the slowest"
    assert on_one_host(4, 4, 1e9).experts(300).seconds >= products * 0.999, "sixteen threads are no faster"


def test_steps_of_one_host_take_turns() -> None:
    timer = on_one_host(2, 2)
    timer.costs.attention["cpu"] = timer.costs.attention["cuda"]
    shape = decode(8, 1)
    assert timer.in_flight(shape, 2, 2) == pytest.approx(2 * timer.time(shape).alone)
    assert timer.binding(shape, 2, 2) == "host"


def test_messages_wire_router_and_step() -> None:
    router = nothing_but_roofs(
        RouterCosts,
        per_layer=100.0,
        per_element=1000.0,
        per_message=1.0,
        per_byte=1e-3,
        per_step=7.0,
        per_row=0.5,
        per_draw=3.0,
    )
    costs = dataclasses.replace(IDEAL, router=router, round_trip=10.0)
    seconds = StepTimer(cluster(4), costs).time(decode(2, 1)).seconds
    assert seconds["router"] == pytest.approx(4 * (100 + 2 * 100 * 1000))
    workers = StepTimer(cluster(4), costs).experts(2).workers
    crossing = 4 * 2 * (1 + 2) * 100 * 2
    assert seconds["messages"] == pytest.approx(4 * (1 + workers) + 2 * crossing * 1e-3)
    assert seconds["wire"] == pytest.approx(4 * 2 * 10 + 2 * crossing / 1e9)
    assert seconds["step"] == pytest.approx(7 + 2 * 0.5 + 2 * 3)
    fused = StepTimer(cluster(1, link=0.0), costs).time(decode(2, 1)).seconds
    assert fused["messages"] == fused["wire"] == 0


def test_where_the_router_is_and_how_rows_go() -> None:
    router = nothing_but_roofs(RouterCosts, per_message=1.0, per_byte=1e-3, per_element=1.0)
    costs = dataclasses.replace(IDEAL, router=router, round_trip=10.0)
    shape, row = decode(2, 1), 4 * 2 * 100 * 2
    workers = StepTimer(cluster(4), costs).experts(2).workers

    def seconds(**changes: bool) -> dict[str, float]:
        return StepTimer(cluster(4, **changes), costs).time(shape).seconds

    inside = seconds(has_router_inside=True)
    assert inside["messages"] == pytest.approx(4 * workers + 2 * 2 * row * 1e-3), "two experts' rows, each way"
    assert inside["wire"] == pytest.approx(4 * 10 + 2 * 2 * row / 1e9)
    pairs = seconds(rows_by_pairs=True)
    assert pairs["messages"] == pytest.approx(4 * (1 + workers) + 2 * row * 1e-3), "attention's rows only"
    assert pairs["wire"] == pytest.approx(4 * 2 * 10 + 2 * 3 * row / 1e9), "the network has them all"
    assert pairs["router"] == 0
    both = seconds(has_router_inside=True, rows_by_pairs=True)
    assert both["messages"] == pytest.approx(4 * workers)


def test_what_a_layer_costs_beside_its_roofs() -> None:
    attention = AttentionCosts(
        bandwidth=1e30,
        flops=1e30,
        tile_rows=1,
        per_product=1.0,
        per_attend=10.0,
        per_layer=100.0,
        per_sequence=1000.0,
        per_query=1e-1,
        per_element=1e-2,
        per_score=1e-3,
        per_logit=1e-4,
        kv=1e30,
    )
    experts = nothing_but_roofs(
        ExpertCosts, bandwidth=1e30, flops=1e30, per_layer=5.0, per_expert=1.0, per_element=1e-2
    )
    costs = dataclasses.replace(IDEAL, attention={"cuda": attention}, experts={"cuda": experts})
    seconds = StepTimer(cluster(1), costs).time(StepShape(6, 2, 1, 70.0, 9.0)).seconds
    layer = 2 * 1 + 10 + 2 * 1000 + 6 * 120 * 0.1 + 100 + 6 * 100 * 0.01 + 4 * 70 * 1e-3
    assert seconds["attention"] == pytest.approx(4 * layer + 1 + 1000 * 1e-4)
    rows = 6 * 2 * (100 + 200) * 1e-2
    touched = StepTimer(cluster(4), costs).experts(6).workers
    assert seconds["experts"] == pytest.approx(4 * (5 + touched + rows))


def test_a_cpus_cores_share_what_is_counted_per_core() -> None:
    cost = nothing_but_roofs(AttentionCosts, bandwidth=1e30, flops=1e30, kv=1e30, per_element=1.0, per_layer=7.0)
    costs = dataclasses.replace(IDEAL, attention={"cuda": cost, "cpu": cost})
    card, host = (StepTimer(cluster(attention=each), costs).time(decode(1, 1)) for each in (DEVICE, HOST))
    assert card.busy_attention == pytest.approx(4 * (7 + 100))
    assert host.busy_attention == pytest.approx(4 * (7 + 100 / 4))


def test_code_is_slower_where_weights_have_passed() -> None:
    """On one host with the experts, between two layers; a router of its own has no weights."""
    caches = ((1e3, 100e9), (1e6, 100e9), (1e9, 1e9))
    device = dataclasses.replace(HOST, caches=caches, cold=3.0)
    router = nothing_but_roofs(RouterCosts, per_layer=1.0)
    costs = Costs(
        attention={"cpu": IDEAL.attention["cuda"]},
        experts={"cpu": IDEAL.experts["cuda"]},
        router=router,
        round_trip=0.0,
        link=1.0,
        origin="",
    )
    apart = StepTimer(cluster(1, device, attention=device), costs)
    together = StepTimer(cluster(1, device, attention=device, host=SharedHost(4, 4)), costs)
    assert apart.time(decode(1, 1)).seconds["router"] == pytest.approx(4)
    assert together.time(decode(1, 1)).seconds["router"] == pytest.approx(4), "240 kB displace nothing"
    small = dataclasses.replace(device, caches=((1e3, 100e9), (1e5, 1e9)))
    pushed = StepTimer(cluster(1, small, attention=small, host=SharedHost(4, 4)), costs)
    assert pushed.time(decode(1, 1)).seconds["router"] == pytest.approx(12), "they displace it all"


def test_steps_together_queue_where_it_is_busiest() -> None:
    timer = StepTimer(cluster(1, attention_workers=6, lanes=1), IDEAL)
    shape = decode(8, 1)
    time = timer.time(shape)
    assert timer.in_flight(shape, 1, 1) == time.alone
    assert timer.in_flight(shape, 1, 60) == pytest.approx(60 * time.busy_experts / SHARED_MOST)
    assert timer.in_flight(shape, 60, 60) == pytest.approx(60 * time.busy_experts), "steps of one worker are in order"
    small = decode(1, 1)
    rest = 59 * timer.time(small).busy_experts
    assert timer.in_flight(shape, 1, 60, small) == pytest.approx((time.busy_experts + rest) / SHARED_MOST)
    assert timer.binding(shape, 1, 60) == "experts"
    copied = StepTimer(cluster(1, attention_workers=6, copies=3), IDEAL)
    assert copied.in_flight(shape, 1, 60) == pytest.approx(
        max(time.alone, 20 * time.busy_experts / SHARED_MOST, 60 * time.busy_link / SHARED_MOST)
    )


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
