"""The parts of a step's time that one flight through a layer takes, from the formulas of a planned cluster."""

from __future__ import annotations

import dataclasses

from planner.attention_time import attention_seconds
from planner.cluster import Cluster
from planner.costs import Costs
from planner.shape import StepShape
from planner.step_time import hops, row_bytes


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """Seconds. attend: of the attention worker's device in a layer, its share of the head included. router: of gate,
    dispatch and combine in a layer, and of all bytes. message: of one more. hops: see step_time. hop: of a message one
    way, beside the router's part. crossing: of a layer's rows through the router's network, each way. plan, deliver: of
    the step."""

    rows: int
    num_layers: int
    attend: float
    router: float
    message: float
    hops: int
    hop: float
    crossing: float
    plan: float
    deliver: float


def step_costs(cluster: Cluster, costs: Costs, shape: StepShape) -> StepCosts:
    """Summed up over the layers, and with nobody else about, they are a step's time as step_time has it."""
    layers, router = cluster.config.num_layers, costs.router
    crossing = row_bytes(cluster, shape.rows)
    round_trip = costs.round_trip if cluster.round_trip is None else cluster.round_trip
    elements = 0 if cluster.rows_by_pairs else shape.rows * cluster.config.hidden_size
    step = router.per_step + shape.rows * router.per_row + shape.draws * router.per_draw
    return StepCosts(
        rows=shape.rows,
        num_layers=layers,
        attend=attention_seconds(cluster, costs.attention[cluster.attention.kind], shape) / layers,
        router=router.per_layer + elements * router.per_element + 2 * crossing.in_messages / layers * router.per_byte,
        message=router.per_message,
        hops=hops(cluster),
        hop=round_trip / 2,
        crossing=crossing.all / layers / (cluster.link * costs.link),
        plan=step / 2,
        deliver=step / 2,
    )
