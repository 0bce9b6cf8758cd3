"""A plan for programs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from planner.command import Plan
from planner.memory import attention_memory, expert_memory
from planner.search import price_per_million
from planner.tables import step_shapes


def as_json(plan: Plan) -> dict[str, Any]:
    """What `describe` says; seconds, GiB, tokens/s. What is infinite is None."""
    wish, found = plan.wish, plan.found
    cluster = found.cluster
    whole: dict[str, Any] = _finite(
        {
            "settings": dataclasses.asdict(plan.settings),
            "holds": plan.holds,
            "binding": found.bound.binding,
            "price_per_hour": cluster.price,
            "price_per_million_output_tokens": price_per_million(found),
            "bound": dataclasses.asdict(found.bound),
            "forecast": dataclasses.asdict(found.forecast),
            "attention_workers": cluster.attention_workers,
            "attention_device": cluster.attention.name,
            "routers": cluster.routers,
            "lanes": cluster.lanes,
            "copies": cluster.copies,
            "expert_workers": [
                {
                    "device": card.device.name,
                    "holds": cluster.layout.spec(card),
                    "memory": dataclasses.asdict(
                        expert_memory(wish.config, cluster.expert_dtype, card.device, card.last - card.first)
                    ),
                }
                for card in cluster.layout.cards
            ],
            "attention_memory": dataclasses.asdict(
                attention_memory(wish.config, cluster.dtype, cluster.attention, cluster.kv_gib)
            ),
            "steps": {
                name: {**found.timer.time(shape).seconds, "whole": found.timer.time(shape).alone}
                for name, shape in step_shapes(plan)
            },
            "simulated": None if plan.outcome is None else dataclasses.asdict(plan.outcome),
            "costs": dataclasses.asdict(plan.costs),
        }
    )
    return whole


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
