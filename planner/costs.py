"""How far from their roofs the parts of a step are, and what every call, message and layer costs beside them.

A cost is a physical figure of a machine and a program, none of a model: what grows with a model's sizes is per row,
element, score or byte, or a share of a roof. So costs that one model was measured for predict another.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductCosts:
    """Products of matrices on a kind of device. bandwidth, flops: share of the roof. tile_rows: rows that a product
    computes at least: registers and tensor cores take so many at a time, and fewer take as long."""

    bandwidth: float
    flops: float
    tile_rows: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCosts(ProductCosts):
    """Of an attention worker. Seconds; those of sequences, elements, scores and logits are seconds of a core where the
    device is a CPU, since its cores share that work.

    per_product: a product's call. per_attend: of a layer's attention, whatever it computes. per_layer: all else of a
    layer: norms, additions, hand-overs. per_sequence: of a sequence in a layer: its pages. per_query: of an element of
    a query in a layer: its rotation, its place in a tile. per_element: of an element of a row in a layer. per_score: of
    a head's product of two positions, exponential included. per_logit: of a logit that is looked at to draw. kv: share
    of the bandwidth at which pages are read.
    """

    per_product: float
    per_attend: float
    per_layer: float
    per_sequence: float
    per_query: float
    per_element: float
    per_score: float
    per_logit: float
    kv: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertCosts(ProductCosts):
    """Of an expert worker. Seconds. per_layer: of a call. per_expert: of each expert that has rows. per_element: of an
    element of a row, in or between the matrices; of a core where the device is a CPU."""

    per_layer: float
    per_expert: float
    per_element: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterCosts:
    """Of a router's process, which one core computes. Seconds.

    per_layer, per_element: gate, dispatch and combine, of a layer and of an element of a row in it. per_message: of a
    message there and back, one after another. per_byte: of a byte of them, in both processes: encoding, copies and
    sockets. per_step, per_row, per_draw: schedule, plan and delivery of a step, of its tokens, of those that it draws.
    per_request: from a call to its first step, and its answer.
    """

    per_layer: float
    per_element: float
    per_message: float
    per_byte: float
    per_step: float
    per_row: float
    per_draw: float
    per_request: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Everything that is no roof. attention, experts: by kind of device. round_trip: seconds of an empty message beside
    the router's part: network, and the worker's reading, waking and answering. link: share of the network's rate that
    is reached. origin: where these figures come from."""

    attention: dict[str, AttentionCosts]
    experts: dict[str, ExpertCosts]
    router: RouterCosts
    round_trip: float
    link: float
    origin: str


ASSUMED = Costs(
    # Of a card: a dozen launches a layer; grouped products of few rows reach two thirds of the bandwidth.
    attention={
        "cuda": AttentionCosts(
            bandwidth=0.65,
            flops=0.45,
            tile_rows=16,
            per_product=12e-6,
            per_attend=40e-6,
            per_layer=56e-6,
            per_sequence=0.1e-6,
            per_query=4e-12,
            per_element=4e-12,
            per_score=1e-13,
            per_logit=1e-11,
            kv=0.5,
        ),
        "cpu": AttentionCosts(
            bandwidth=0.8,
            flops=0.75,
            tile_rows=16,
            per_product=15e-6,
            per_attend=40e-6,
            per_layer=60e-6,
            per_sequence=25e-6,
            per_query=10e-9,
            per_element=2e-9,
            per_score=3e-9,
            per_logit=1e-9,
            kv=0.2,
        ),
    },
    experts={
        "cuda": ExpertCosts(
            bandwidth=0.7, flops=0.45, tile_rows=16, per_layer=70e-6, per_expert=2e-6, per_element=8e-12
        ),
        "cpu": ExpertCosts(
            bandwidth=0.8, flops=0.75, tile_rows=16, per_layer=150e-6, per_expert=5e-6, per_element=1.2e-9
        ),
    },
    router=RouterCosts(
        per_layer=75e-6,
        per_element=2e-9,
        per_message=200e-6,
        per_byte=0.5e-9,
        per_step=300e-6,
        per_row=2e-6,
        per_draw=10e-6,
        per_request=1e-3,
    ),
    round_trip=200e-6,
    link=0.7,
    origin="assumed",
)
"""Without a measurement. None of it is measured on a GPU; those of CPUs and the router are of the size of what was."""
