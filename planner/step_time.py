"""How long a step takes, leg by leg, and what it occupies meanwhile.

    attention   attention_time.py
    experts     sum over layers of the slowest card's (experts_time.py)
    router      layers (c + rows hidden r): gate, dispatch, combine
    messages    layers (1 + workers with rows) m + bytes b: the router's process sends and takes them in turn
    wire        layers 2 t + bytes through the router / (link e_l)
                with the router inside the attention worker without the 1, and with one t; rows by pairs without b and r
    step        s + rows r + draws d: plan, schedule, delivery

A step on its own takes the sum. With more steps in flight than one, what several of them need is a queue: no step is
faster than the sum, and the n steps together not faster than n times the busiest of attention, router, link, experts.
Where all roles share a host they take turns: whoever waits for a product waits on a core.
"""

from __future__ import annotations

import dataclasses

from planner.attention_time import attention_seconds
from planner.cluster import Cluster
from planner.costs import Costs
from planner.experts_time import ExpertsTime, experts_time
from planner.shape import StepShape

LEGS = ("attention", "router", "messages", "wire", "experts", "step")
"""In the order of a step."""

SHARED_MOST = 0.9
"""Share of what several attention workers share that is planned for: they know nothing of each other, and the queue for
what is always busy has no end."""

ROW_BYTES = 2
"""Of an element of a row between processes."""


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
            self._experts[rows] = experts_time(self.cluster, self.costs.experts, rows)
        return self._experts[rows]

    def time(self, shape: StepShape) -> StepTime:
        """Of one step."""
        if shape not in self._steps:
            self._steps[shape] = self._time(shape)
        return self._steps[shape]

    def _time(self, shape: StepShape) -> StepTime:
        cluster, cost = self.cluster, self.costs.router
        layers, hidden = cluster.config.num_layers, cluster.config.hidden_size
        experts = self.experts(shape.rows)
        attention = attention_seconds(cluster, self.costs.attention[cluster.attention.kind], shape)
        slower = cluster.slowdown(shape.rows)
        elements = 0 if cluster.rows_by_pairs else shape.rows * hidden
        router = layers * (cost.per_layer * slower + elements * cost.per_element)
        step = cost.per_step + shape.rows * cost.per_row + shape.draws * cost.per_draw
        messages = wire = link = 0.0
        if not cluster.is_fused:
            crossing = row_bytes(cluster, shape.rows)
            messages = layers * (hops(cluster) - 1 + experts.workers) * cost.per_message * slower
            messages += 2 * crossing.in_messages * cost.per_byte
            round_trip = self.costs.round_trip if cluster.round_trip is None else cluster.round_trip
            wire = layers * hops(cluster) * round_trip * slower
            link = 0.0 if cluster.host else crossing.all / (cluster.link * self.costs.link)
        seconds = {
            "attention": attention,
            "router": router,
            "messages": messages,
            "wire": wire + 2 * link,
            "experts": experts.seconds,
            "step": step,
        }
        return StepTime(seconds, attention, router + messages + step, link, experts.seconds)

    def in_flight(self, shape: StepShape, here: int, everywhere: int, others: StepShape | None = None) -> float:
        """Seconds of a step while others are under way.

        here: steps of this attention worker, this one included; everywhere: of all, which share experts, and of each
        router its own part of them. others: what those are like; None: like this one.
        """
        return max(self.time(shape).alone, *self._queues(shape, here, everywhere, others).values())

    def binding(self, shape: StepShape, here: int, everywhere: int) -> str:
        """What a step with others under way waits for: a resource that is always busy, or else its longest leg."""
        time, queues = self.time(shape), self._queues(shape, here, everywhere)
        name = max(queues, key=lambda each: queues[each])
        if queues[name] >= time.alone:
            return name
        return max(time.seconds, key=lambda leg: time.seconds[leg])

    def _queues(
        self, shape: StepShape, here: int, everywhere: int, others: StepShape | None = None
    ) -> dict[str, float]:
        """Seconds in which each resource has done its part of all the steps that queue for it."""
        time, cluster = self.time(shape), self.cluster
        other = time if others is None else self.time(others)
        at_router, at_experts = everywhere / cluster.routers, everywhere / cluster.copies

        def queue(steps: float, own: float, of_others: float) -> float:
            seconds = own + (steps - 1) * of_others if steps > 1 else steps * own
            return seconds / (SHARED_MOST if steps > here else 1.0)

        return {
            "attention": queue(here, time.busy_attention, other.busy_attention),
            "router": queue(at_router, time.busy_router, other.busy_router),
            "link": queue(at_router, time.busy_link, other.busy_link),
            "experts": queue(at_experts, time.busy_experts, other.busy_experts),
            "host": queue(everywhere, time.alone, other.alone) if cluster.host else 0.0,
        }


def hops(cluster: Cluster) -> int:
    """Of a layer: from attention to the router, if that is another process, and from there to the experts."""
    return 1 if cluster.has_router_inside else 2


@dataclasses.dataclass(frozen=True)
class RowBytes:
    """Of a step through the router, each way: copied in and out of messages, and those beside them."""

    in_messages: float
    by_pairs: float

    @property
    def all(self) -> float:
        """On the network."""
        return self.in_messages + self.by_pairs


def row_bytes(cluster: Cluster, rows: int) -> RowBytes:
    """A row from attention, unless it is the same process, and one from each of its experts; as many back."""
    config = cluster.config
    row = config.num_layers * rows * config.hidden_size * ROW_BYTES
    attention, experts = float(row * (hops(cluster) - 1)), float(row * config.experts_per_token)
    return RowBytes(attention, experts) if cluster.rows_by_pairs else RowBytes(attention + experts, 0.0)
