"""Costs from measured steps: the figures with which the model of a step misses them by the smallest relative error."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from grokmoe.errors import ConfigError
from planner.cluster import Cluster
from planner.costs import ASSUMED, Costs, Efficiency
from planner.device import Device
from planner.layout import lay_out
from planner.measured import ATTENTION_LEGS, EXPERT_LEGS, ROUTER_LEGS, WIRE_LEGS, Observation
from planner.shape import StepShape
from planner.step_time import StepTimer, attention_seconds, hub_bytes

SHARES = tuple(float(share) for share in np.geomspace(0.02, 2.0, 21))
"""Efficiencies that are tried; above 1: a data sheet that is too modest, or weights that lie in a cache."""

Floats = npt.NDArray[np.float64]


def cluster_of(observation: Observation, device: Device, link: float) -> Cluster:
    """What was measured: all workers on one device, the expert workers with equal parts of it."""
    config = observation.config
    workers = max(1, observation.expert_workers)
    room = config.num_experts * config.num_layers
    return Cluster(
        config=config,
        dtype="bfloat16",
        expert_dtype="bfloat16",
        attention=device,
        attention_workers=1,
        routers=1,
        lanes=1,
        layout=lay_out([device] * workers, [room] * workers, config.num_experts, config.num_layers),
        copies=1,
        link=link if observation.expert_workers else 0.0,
        kv_gib=1.0,
        experts_share=workers,
    )


def predict(observation: Observation, device: Device, link: float, costs: Costs) -> dict[str, float]:
    """Seconds of the steps, by leg of the model; `all` is their sum."""
    timer = StepTimer(cluster_of(observation, device, link), costs)
    legs: dict[str, float] = {}
    for share, shape in observation.shapes:
        for leg, seconds in timer.time(shape).seconds.items():
            legs[leg] = legs.get(leg, 0.0) + share * seconds
    return legs | {"all": sum(legs.values())}


def fit(observations: Sequence[Observation], device: Device, link: float, origin: str) -> Costs:
    """All costs, of the device's kind for attention and experts. Raises ConfigError without observations."""
    if not observations:
        raise ConfigError("costs cannot be fitted to nothing")
    clusters = [cluster_of(o, device, link) for o in observations]
    layers = [o.config.num_layers for o in observations]

    def attention(efficiency: Efficiency, index: int, shape: StepShape) -> float:
        return attention_seconds(clusters[index], efficiency, shape)

    def experts(efficiency: Efficiency, index: int, shape: StepShape) -> float:
        costs = dataclasses.replace(ASSUMED, experts={device.kind: efficiency})
        return StepTimer(clusters[index], costs).experts(shape.rows).seconds

    def features(*values: Callable[[int, StepShape], float]) -> Floats:
        return np.stack([_total(observations, value) for value in values], axis=1)

    def messages(index: int, shape: StepShape) -> float:
        return layers[index] * (1 + StepTimer(clusters[index], ASSUMED).experts(shape.rows).workers)

    wire = np.zeros(3)
    split = np.array([o.expert_workers > 0 for o in observations])
    if split.any():
        of_wire = features(
            messages,
            lambda index, shape: 2 * layers[index],
            lambda index, shape: 2 * hub_bytes(clusters[index], shape.rows) / link,
        )
        wire = nonnegative(of_wire[split], np.array([o.leg(*WIRE_LEGS) for o in observations])[split])
    of_router = features(lambda index, shape: layers[index], lambda index, shape: layers[index] * shape.rows)
    router = nonnegative(of_router, np.array([o.leg(*ROUTER_LEGS) for o in observations]))
    of_step = features(lambda index, shape: 1.0, lambda index, shape: shape.draws)
    step = nonnegative(of_step, np.array([o.other for o in observations]))
    return Costs(
        attention={device.kind: _efficiency(observations, attention, [o.leg(*ATTENTION_LEGS) for o in observations])},
        experts={device.kind: _efficiency(observations, experts, [o.leg(*EXPERT_LEGS) for o in observations])},
        per_message=float(wire[0]),
        round_trip=float(wire[1]),
        link=float(1 / wire[2]) if wire[2] > 0 else 1.0,
        per_router_layer=float(router[0]),
        per_router_row=float(router[1]),
        per_step=float(step[0]),
        per_draw=float(step[1]),
        origin=origin,
    )


def _total(observations: Sequence[Observation], value: Callable[[int, StepShape], float]) -> Floats:
    """Per observation, the sum over its steps."""
    return np.array(
        [sum(share * value(index, shape) for share, shape in o.shapes) for index, o in enumerate(observations)]
    )


def _efficiency(
    observations: Sequence[Observation],
    model: Callable[[Efficiency, int, StepShape], float],
    seconds: Sequence[float],
) -> Efficiency:
    """The best of a grid of shares; the times per layer and per row follow from each of them."""
    target = np.array(seconds)
    best, least = Efficiency(per_layer=0.0, per_row=0.0, bandwidth=1.0, flops=1.0), np.inf

    def seconds_of(efficiency: Efficiency) -> Floats:
        return _total(observations, lambda index, shape: model(efficiency, index, shape))

    features = np.stack([seconds_of(_ONLY_LAYERS), seconds_of(_ONLY_ROWS)], axis=1)
    for bandwidth, flops in itertools.product(SHARES, SHARES):
        bare = Efficiency(per_layer=0.0, per_row=0.0, bandwidth=bandwidth, flops=flops)
        roof = seconds_of(bare)
        found = nonnegative(features, target, roof)
        error = float(np.sum(((roof + features @ found - target) / target) ** 2))
        if error < least:
            best, least = dataclasses.replace(bare, per_layer=float(found[0]), per_row=float(found[1])), error
    return best


_ONLY_LAYERS = Efficiency(per_layer=1.0, per_row=0.0, bandwidth=1e30, flops=1e30)
_ONLY_ROWS = Efficiency(per_layer=0.0, per_row=1.0, bandwidth=1e30, flops=1e30)
"""Of these a step takes as many seconds as it has layers, and rows in layers, that count."""


def nonnegative(features: Floats, target: Floats, known: Floats | float = 0.0) -> Floats:
    """The coefficients c >= 0 with which `known + features @ c` has the smallest squared relative error.

    Every subset of the features is tried, so they should be few. Targets of 0 do not count.
    """
    counted = target > 0
    scaled = features[counted] / target[counted, None]
    wanted = ((target - known) / np.where(counted, target, 1.0))[counted]
    num = features.shape[1]
    best, least = np.zeros(num), float(np.sum(wanted**2))
    for size in range(1, num + 1):
        for chosen in itertools.combinations(range(num), size):
            part = scaled[:, chosen]
            found = np.linalg.lstsq(part, wanted, rcond=None)[0]
            error = float(np.sum((part @ found - wanted) ** 2))
            if (found >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(num), error
                best[list(chosen)] = found
    return best
