"""How far from their roofs the parts of a step are, and what every message and layer costs beside them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Of one kind of work on one kind of device.

    per_layer: seconds of a layer whatever its size: launches, loops, hand-overs. per_row: seconds of a row in a layer,
    beside products: norms, activations, copies; of experts a row is a token at one expert. bandwidth, flops: share of
    the roof.
    """

    per_layer: float
    per_row: float
    bandwidth: float
    flops: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Everything that is no roof. Seconds.

    attention, experts: by kind of device. per_message: of the router's process, for one message there and back, its
    part of encoding, sending and waking included. round_trip: of an empty message, network and both ends' waking.
    link: share of the network's rate. per_router_layer, per_router_row: gate, dispatch and combine, of a layer and of a
    row in it. per_step, per_draw: plan, scheduling, sampling, delivery. origin: where these figures come from.
    """

    attention: dict[str, Efficiency]
    experts: dict[str, Efficiency]
    per_message: float
    round_trip: float
    link: float
    per_router_layer: float
    per_router_row: float
    per_step: float
    per_draw: float
    origin: str


ASSUMED = Costs(
    # Of a card: a dozen launches a layer; grouped products of few rows reach two thirds of the bandwidth.
    attention={
        "cuda": Efficiency(per_layer=120e-6, per_row=50e-9, bandwidth=0.65, flops=0.45),
        "cpu": Efficiency(per_layer=300e-6, per_row=1e-6, bandwidth=0.5, flops=0.35),
    },
    experts={
        "cuda": Efficiency(per_layer=80e-6, per_row=50e-9, bandwidth=0.7, flops=0.45),
        "cpu": Efficiency(per_layer=200e-6, per_row=1e-6, bandwidth=0.6, flops=0.35),
    },
    # Half of what two busy cores needed for router and workers together (docs/scaling.md): workers have other cores.
    per_message=300e-6,
    round_trip=200e-6,
    link=0.7,
    per_router_layer=250e-6,
    per_router_row=3e-6,
    per_step=700e-6,
    per_draw=30e-6,
    origin="assumed",
)
"""Without a measurement. None of it is measured on a GPU; the router's are of the size of what was measured on CPUs."""
