"""A cluster small enough to work out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

from grokmoe.model_config import ModelConfig
from planner.cluster import Cluster
from planner.costs import AttentionCosts, Costs, ExpertCosts, RouterCosts
from planner.device import Device
from planner.layout import lay_out

CONFIG = ModelConfig(
    vocab_size=1000,
    hidden_size=100,
    intermediate_size=200,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=30,
    num_experts=4,
    experts_per_token=2,
    context_length=4096,
)

DEVICE = Device(name="d", kind="cuda", memory=80.0, bandwidth=1e9, flops={"bfloat16": 1e12}, price=2.0)

_ROOFS = {"bandwidth": 1.0, "flops": 1.0, "tile_rows": 1.0}


def nothing_but_roofs(kind: type[Any], **changes: float) -> Any:
    """Costs of which only the roofs take time."""
    fields = {field.name: _ROOFS.get(field.name, 0.0) for field in dataclasses.fields(kind)}
    return kind(**(fields | changes))


IDEAL = Costs(
    attention={"cuda": nothing_but_roofs(AttentionCosts, kv=1.0)},
    experts={"cuda": nothing_but_roofs(ExpertCosts)},
    router=nothing_but_roofs(RouterCosts),
    round_trip=0.0,
    link=1.0,
    origin="nothing but roofs",
)


def cluster(num_cards: int = 4, device: Device = DEVICE, **changes: Any) -> Cluster:
    """One attention worker, one router, one lane; a link of 1 GB/s."""
    room = CONFIG.num_experts * CONFIG.num_layers
    base = Cluster(
        config=CONFIG,
        dtype="bfloat16",
        expert_dtype="bfloat16",
        attention=DEVICE,
        attention_workers=1,
        routers=1,
        lanes=1,
        layout=lay_out([device] * num_cards, [room] * num_cards, CONFIG.num_experts, CONFIG.num_layers),
        copies=1,
        link=1e9,
        kv_gib=1.0,
    )
    return dataclasses.replace(base, **changes)
