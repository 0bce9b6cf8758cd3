"""How long a step takes, leg by leg, and what it occupies meanwhile.

    attention   layers (o + rows r) + sum over projections, pages and head of the longer of
                bytes / (bandwidth e_b) and products / (flops e_f)
    experts     sum over layers of the slowest card's (experts_time.py)
    router      layers (c + rows r): gate, dispatch, combine
    messages    layers (1 + workers with rows) m: the router's process sends and takes them one after another
    wire        layers 2 t + bytes through the router / (link e_l)
    step        s + draws d: plan, sampling, delivery

A step on its own takes the sum. With more steps in flight than one, what several of them need is a queue: no step is
faster than the sum, and the n steps together not faster than n times the busiest of attention, router, link, experts.
"""

from __future__ import annotations

import dataclasses

from planner.cluster import Cluster
from planner.costs import Costs, Efficiency
from planner.device import Device
from planner.experts_time import ExpertsTime, experts_time
from planner.model_size import head_params, kv_bytes, projection_params, weight_bytes
from planner.shape import StepShape

LEGS = ("attention", "router", "messages", "wire", "experts", "step")
"""In the order of a step."""

_MATMUL = 2  # a multiplication and an addition


@dataclasses.dataclass(frozen=True)
class StepTime:
    """seconds: by leg. What the step keeps busy, seconds: the attention worker, the router's process, its network in
    the busier direction, the busiest cards of a copy."""

    seconds: dict[str, float]
    busy_attention: float
    busy_router: float
    busy_link: float
    busy_experts: float

    @property
    def alone(self) -> float:
        """With nothing else in flight."""
        return sum(self.seconds.values())


class StepTimer:
    """Times of the steps of a cluster, remembered by shape."""

    def __init__(self, cluster: Cluster, costs: Costs, other: StepTimer | None = None) -> None:
        """other: of a cluster that differs in numbers of copies, workers, routers, lanes only: what it knows counts."""
        self.cluster, self.costs = cluster, costs
        self._experts: dict[int, ExpertsTime] = {} if other is None else other._experts
        self._steps: dict[StepShape, StepTime] = {} if other is None else other._steps

    def experts(self, rows: int) -> ExpertsTime:
        """Of a step with so many rows."""
        if rows not in self._experts:
            cluster = self.cluster
            self._experts[rows] = experts_time(
                cluster.layout,
                self.costs.experts,
                rows,
                cluster.config,
                cluster.expert_dtype,
                cluster.experts_share,
            )
        return self._experts[rows]

    def time(self, shape: StepShape) -> StepTime:
        """Of one step."""
        if shape not in self._steps:
            self._steps[shape] = self._time(shape)
        return self._steps[shape]

    def _time(self, shape: StepShape) -> StepTime:
        cluster, costs = self.cluster, self.costs
        layers = cluster.config.num_layers
        experts = self.experts(shape.rows)
        seconds = {
            "attention": attention_seconds(cluster, costs.attention[cluster.attention.kind], shape),
            "router": layers * (costs.per_router_layer + shape.rows * costs.per_router_row),
            "messages": 0.0,
            "wire": 0.0,
            "experts": experts.seconds,
            "step": costs.per_step + shape.draws * costs.per_draw,
        }
        link = 0.0
        if not cluster.is_fused:
            seconds["messages"] = layers * (1 + experts.workers) * costs.per_message
            round_trip = costs.round_trip if cluster.round_trip is None else cluster.round_trip
            crossing = hub_bytes(cluster, shape.rows) / (cluster.link * costs.link)
            seconds["wire"] = layers * 2 * round_trip + 2 * crossing
            link = crossing
        router = seconds["router"] + seconds["messages"] + seconds["step"]
        return StepTime(seconds, seconds["attention"], router, link, experts.seconds)

    def in_flight(self, shape: StepShape, here: int, everywhere: int) -> float:
        """Seconds of a step while others are under way.

        here: steps of this attention worker, this one included; everywhere: of all, which share experts, and of each
        router its own part of them.
        """
        time, cluster = self.time(shape), self.cluster
        return max(
            time.alone,
            here * time.busy_attention,
            everywhere / cluster.routers * max(time.busy_router, time.busy_link),
            everywhere / cluster.copies * time.busy_experts,
        )

    def binding(self, shape: StepShape, here: int, everywhere: int) -> str:
        """What a step with others under way waits for: a resource that is always busy, or else its longest leg."""
        time, cluster = self.time(shape), self.cluster
        busy = {
            "attention": here * time.busy_attention,
            "router": everywhere / cluster.routers * time.busy_router,
            "link": everywhere / cluster.routers * time.busy_link,
            "experts": everywhere / cluster.copies * time.busy_experts,
        }
        name = max(busy, key=lambda each: busy[each])
        if busy[name] >= time.alone:
            return name
        return max(time.seconds, key=lambda leg: time.seconds[leg])


def attention_parts(cluster: Cluster, shape: StepShape) -> list[tuple[float, float]]:
    """(bytes, products) of projections, pages and head, all layers."""
    config, size = cluster.config, weight_bytes(cluster.dtype)
    projections = config.num_layers * projection_params(config)
    return [
        (projections * size, _MATMUL * projections * shape.rows),
        (
            shape.read * kv_bytes(config, cluster.dtype),
            2 * _MATMUL * config.num_layers * config.query_size * shape.attended,
        ),
        (head_params(config) * size if shape.draws else 0.0, _MATMUL * head_params(config) * shape.draws),
    ]


def attention_seconds(cluster: Cluster, cost: Efficiency, shape: StepShape) -> float:
    """Of the attention worker's device in a step."""
    device: Device = cluster.attention
    bandwidth, flops = device.bandwidth * cost.bandwidth, device.peak(cluster.dtype) * cost.flops
    parts = attention_parts(cluster, shape)
    roofs = sum(max(read / bandwidth, products / flops) for read, products in parts)
    return roofs + cluster.config.num_layers * (cost.per_layer + shape.rows * cost.per_row)


def hub_bytes(cluster: Cluster, rows: int) -> float:
    """Through the router in each direction: a row from attention and one from each of its experts; as many back."""
    config = cluster.config
    return float(config.num_layers * rows * (1 + config.experts_per_token) * config.hidden_size * 2)
