"""A plan as values for the Helm chart. YAML by hand, since JSON is YAML and no package for it is needed."""

from __future__ import annotations

import json
import math
from typing import Any

from grokmoe.errors import ConfigError
from planner.cluster import Cluster
from planner.command import Plan
from planner.device import Device
from planner.memory import BATCH_ROWS, attention_memory, expert_memory
from planner.search import price_per_million
from planner.settings import GROK1_NAME

MOST_COPIES, MOST_CELLS, MOST_REPLICAS = 16, 64, 256
"""What one release of the chart takes."""

HOST_GIB = 16
"""Memory of the host for a worker on a card."""


def helm_values(plan: Plan) -> str:
    """The text of a values file. Raises ConfigError for a plan that is more than one release."""
    cluster, settings = plan.found.cluster, plan.settings
    replicas = cluster.attention_workers // cluster.routers
    if cluster.copies > MOST_COPIES or cluster.routers > MOST_CELLS or replicas > MOST_REPLICAS:
        raise ConfigError(
            f"values: a release has at most {MOST_COPIES} copies, {MOST_CELLS} cells and {MOST_REPLICAS} attention "
            f"workers in each; this plan has {cluster.copies}, {cluster.routers} and {replicas}: make it for a part of "
            "the load"
        )
    rows = settings.max_step_tokens * cluster.config.experts_per_token
    parts: dict[str, Any] = {
        "model": _model(plan),
        "cells": {"shape": "split", "count": cluster.routers},
        "router": {
            "joinTimeout": 3600,
            "settings": {
                "max-running": settings.max_running,
                "max-step-tokens": settings.max_step_tokens,
                "lanes": cluster.lanes,
                "min-lane-rows": settings.min_lane_rows,
            },
            "resources": {"requests": {"cpu": "4", "memory": "4Gi"}, "limits": {"memory": "8Gi"}},
        },
        "attention": _attention(plan, replicas),
        "experts": {"startupBudget": 3600, "pools": _pools(plan, max(BATCH_ROWS, rows))},
    }
    if cluster.copies > 1:
        parts["antiAffinity"] = "preferred"
    return "\n".join([*_comments(plan), "", *(f"{name}: {json.dumps(part)}" for name, part in parts.items()), ""])


def _comments(plan: Plan) -> list[str]:
    forecast = plan.found.forecast
    return [
        f"# Planned: {plan.settings.model}, {forecast.rate:.3g} requests/s, {forecast.output_rate:.4g} tokens/s out.",
        f"# TTFT p99 {forecast.ttft_p99 * 1e3:.0f} ms, TPOT p99 {forecast.tpot_p99 * 1e3:.0f} ms; binding: "
        f"{plan.found.bound.binding}; {price_per_million(plan.found):.2f} per million output tokens.",
        f"# Costs: {plan.costs.origin}.",
    ]


def _model(plan: Plan) -> dict[str, Any]:
    config = plan.wish.config
    name = GROK1_NAME if plan.settings.model == GROK1_NAME else "planned"
    return {
        "source": "claim",
        "claim": plan.settings.claim,
        "path": name,
        "name": name,
        "numExperts": config.num_experts,
        "numLayers": config.num_layers,
        "dtype": plan.settings.dtype,
    }


def _attention(plan: Plan, replicas: int) -> dict[str, Any]:
    cluster = plan.found.cluster
    device, kv = cluster.attention, math.floor(cluster.kv_gib * 100) / 100
    memory = attention_memory(plan.wish.config, cluster.dtype, device, cluster.kv_gib)
    found: dict[str, Any] = {
        "replicas": replicas,
        "kvGib": kv,
        "startupBudget": 3600,
        "settings": {"threads": device.cores, "max-step-tokens": max(2048, plan.settings.max_step_tokens)},
        **_where(device, memory.need),
    }
    if device.kind == "cuda":
        found |= {"gpu": _gpu(device), "extraArgs": ["--device=cuda"]}
    return found


def _pools(plan: Plan, most_rows: int) -> list[dict[str, Any]]:
    """A pool for each kind of device of a copy, in the order of its cards."""
    cluster: Cluster = plan.found.cluster
    pools = []
    for name in dict.fromkeys(card.device.name for card in cluster.layout.cards):
        cards = [card for card in cluster.layout.cards if card.device.name == name]
        device = cards[0].device
        need = max(
            expert_memory(plan.wish.config, cluster.expert_dtype, device, card.last - card.first).need for card in cards
        )
        pool: dict[str, Any] = {
            "name": name.replace(".", "-").replace("_", "-").lower()[:12].rstrip("-"),
            "pods": [cluster.layout.spec(card) for card in cards],
            "copies": cluster.copies,
            "device": device.kind,
            "settings": {"threads": device.cores, "max-rows": most_rows, "max-batch-rows": most_rows},
            **_where(device, need),
        }
        if device.kind == "cuda":
            pool["gpu"] = _gpu(device)
        if cluster.expert_dtype == "float8":
            pool["settings"]["expert-dtype"] = "fp8_e4m3"
        pools.append(pool)
    return pools


def _gpu(device: Device) -> dict[str, Any]:
    return {"resource": "amd.com/gpu" if device.name.startswith("mi") else "nvidia.com/gpu", "count": 1}


def _where(device: Device, need: float) -> dict[str, Any]:
    """Resources, and on which nodes. need: GiB on the device."""
    gib = HOST_GIB if device.kind == "cuda" else math.ceil(need / 0.95)
    found: dict[str, Any] = {
        "resources": {
            "requests": {"cpu": str(device.cores), "memory": f"{gib}Gi"},
            "limits": {"memory": f"{gib}Gi"},
        }
    }
    if device.kind == "cuda":
        found["tolerations"] = [{"key": str(_gpu(device)["resource"]), "operator": "Exists", "effect": "NoSchedule"}]
        if device.label:
            found["nodeSelector"] = {"nvidia.com/gpu.product": device.label}
    return found
