"""Costs from measured steps: leg by leg, the figures with which the formulas miss them by the smallest factor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from grokmoe.errors import ConfigError
from planner.attention_time import attend_seconds, products_seconds, rows_seconds
from planner.cluster import Cluster
from planner.costs import ASSUMED, AttentionCosts, Costs
from planner.experts_time import experts_time
from planner.log_fit import fit_logs
from planner.measured import (
    ATTEND_LEGS,
    EXPERT_LEGS,
    PRODUCT_LEGS,
    ROUTER_LEGS,
    ROW_LEGS,
    WIRE_LEGS,
    Observation,
)
from planner.shape import StepShape
from planner.step_time import StepTimer

LOOSE, TIGHT = 10.0, 1.3
"""By which factor a figure may well be something else than assumed: a time of a call; a share of a measured roof."""

TIGHT_ONES = ("bandwidth", "flops", "tile_rows")

PRODUCTS = (*TIGHT_ONES, "per_product")
ATTEND = ("per_attend", "per_sequence", "per_query", "per_score", "kv")
ROWS = ("per_layer", "per_element", "per_logit")
EXPERTS = (*TIGHT_ONES, "per_layer", "per_expert", "per_element")
ROUTER = ("per_layer", "per_element")
WIRE = ("per_message", "per_byte", "round_trip")
STEP = ("per_step", "per_row", "per_draw", "per_request")

Values = dict[str, float]
Part = Callable[[Cluster, AttentionCosts, StepShape], float]
Model = Callable[[Observation, Values], float]


def predict(observation: Observation, costs: Costs) -> dict[str, float]:
    """Seconds of what was measured, by leg of the model. `all`: of them together, less than their sum where steps of
    several lanes are in flight at once."""
    timer = StepTimer(observation.cluster, costs)
    legs = {"request": observation.requests * costs.router.per_request}
    whole = legs["request"]
    for share, shape in observation.shapes:
        for leg, seconds in timer.time(shape).seconds.items():
            legs[leg] = legs.get(leg, 0.0) + share * seconds
        whole += share * timer.in_flight(shape, observation.lanes, observation.lanes)
    return legs | {"all": whole}


def fit(observations: Sequence[Observation], origin: str, start: Costs = ASSUMED) -> Costs:
    """All costs, of CPUs for attention and experts. Raises ConfigError without observations.

    start: what is assumed: it holds for all that the observations do not say.
    """
    if not observations:
        raise ConfigError("costs cannot be fitted to nothing")
    attention, experts, router = start.attention["cpu"], start.experts["cpu"], start.router

    def of_attention(part: Part, names: Sequence[str], legs: Sequence[str]) -> Values:
        def model(each: Observation, values: Values) -> float:
            return _sum(each, lambda shape: part(each.cluster, dataclasses.replace(attention, **values), shape))

        return _fit(observations, model, legs, vars(attention), names)

    attention = dataclasses.replace(attention, **of_attention(products_seconds, PRODUCTS, PRODUCT_LEGS))
    attention = dataclasses.replace(attention, **of_attention(attend_seconds, ATTEND, ATTEND_LEGS))
    attention = dataclasses.replace(attention, **of_attention(rows_seconds, ROWS, ROW_LEGS))

    def of_experts(each: Observation, values: Values) -> float:
        costs = {"cpu": dataclasses.replace(experts, **values)}
        return _sum(each, lambda shape: experts_time(each.cluster, costs, shape.rows).seconds)

    experts = dataclasses.replace(experts, **_fit(observations, of_experts, EXPERT_LEGS, vars(experts), EXPERTS))

    def leg_of_router(*legs: str) -> Model:
        def model(each: Observation, values: Values) -> float:
            changed = {name: value for name, value in values.items() if name != "round_trip"}
            costs = dataclasses.replace(
                start,
                router=dataclasses.replace(router, **changed),
                round_trip=values.get("round_trip", start.round_trip),
            )
            told = predict(each, costs)
            return sum(told[leg] for leg in legs)

        return model

    found = _fit(observations, leg_of_router("router"), ROUTER_LEGS, vars(router), ROUTER)
    router = dataclasses.replace(router, **found)
    found = _fit(observations, leg_of_router("step", "request"), (), vars(router), STEP)
    router = dataclasses.replace(router, **found)
    round_trip = start.round_trip
    if split := [each for each in observations if each.expert_workers]:
        known = vars(router) | {"round_trip": round_trip}
        wire = _fit(split, leg_of_router("messages", "wire"), WIRE_LEGS, known, WIRE)
        round_trip = wire.pop("round_trip")
        router = dataclasses.replace(router, **wire)
    return dataclasses.replace(
        start,
        attention={"cpu": attention},
        experts={"cpu": experts},
        router=router,
        round_trip=round_trip,
        origin=origin,
    )


def _sum(observation: Observation, seconds: Callable[[StepShape], float]) -> float:
    return sum(share * seconds(shape) for share, shape in observation.shapes)


def _fit(
    observations: Sequence[Observation],
    model: Model,
    legs: Sequence[str],
    known: Mapping[str, Any],
    names: Sequence[str],
) -> Values:
    """legs: measured; none: what is in no leg."""
    target = np.array([each.leg(*legs) if legs else each.other for each in observations])
    return fit_logs(
        lambda values: np.array([model(each, values) for each in observations]),
        target,
        {name: float(known[name]) for name in names},
        {name: TIGHT if name in TIGHT_ONES else LOOSE for name in names},
        np.array([each.spread for each in observations]),
    )
