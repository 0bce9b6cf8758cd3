"""Real processes are killed, stopped and made to lie in the middle of streams; no client may notice but by waiting.

The short form of `python -m benchmarks.chaos`. One cluster, because starting it costs more than all the faults.
"""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.chaos.campaign import Campaign, Effect, campaign
from benchmarks.chaos.cluster import ClusterPlan
from benchmarks.chaos.load import make_jobs
from benchmarks.chaos.resources import used_pages

pytestmark = pytest.mark.cluster

OF_STAGES = (
    ("kill", "attention 0"),
    ("kill", "attention 1"),
    ("hang", "attention 3"),
    ("nan", "attention 0"),
    ("restart", "attention 1"),
)
"""The same of stages: 0 and 1 are one pipeline, 2 and 3 the other; 0 is behind the proxy."""

FAULTS = (
    ("kill", "expert 1"),
    ("kill", "attention"),
    ("hang", "expert 1"),
    ("nan", "expert 0"),
    ("garbage", "expert 0"),
    ("kill", "router"),
)
"""Kind and target. Expert worker 0 is behind the proxy, which can spoil its answers; the others are not."""

Faults = tuple[tuple[str, str], ...]

MAX_TRIES = 5
"""Times that a fault may meet nobody."""

MAX_STALL = 5.0
"""Seconds. Ten times what is promised, for a machine that runs other tests too; a stall that waits for a time-out
instead of a replica takes 30 and more."""

VOCABULARY = 2048
"""Of the embedded model."""


def complaints(effect: Effect) -> list[str]:
    """What a client could complain of, or an operator. Whose router is killed waits for its restart."""
    return [
        *(f"lost: {error}" for error in effect.errors),
        *([f"{effect.num_changed} streams with other tokens"] if effect.num_changed else []),
        *(["its worker was never used again"] if effect.back is None else []),
        *([f"stalled for {effect.stall:.1f} s"] if effect.stall > MAX_STALL and effect.target != "router" else []),
    ]


async def inject_all(run: Campaign, faults: Faults) -> None:
    for kind, target in faults:
        while await run.inject(kind, target, 0.2) is None:  # an idle pipeline's answers
            assert run.num_without_effect[kind, target] < MAX_TRIES, f"{kind} {target} met nobody"


def test_nothing_is_lost_and_no_token_changes() -> None:
    check(ClusterPlan(attention=2, experts=2, replicas=2, proxied=("expert 0",)), FAULTS)


def test_nor_with_pipelines() -> None:
    check(ClusterPlan(attention=2, stages=2, experts=1, replicas=1, proxied=("attention 0",)), OF_STAGES)


def check(plan: ClusterPlan, faults: Faults) -> None:
    async def scenario() -> None:
        async with campaign(plan, make_jobs(4, VOCABULARY, 3, longest=64), None, concurrency=3, seed=3) as run:
            await inject_all(run, faults)
            await run.load.finish()
            effects = run.effects()
            found = {f"{effect.kind} {effect.target}": complaints(effect) for effect in effects}
            assert not any(found.values()), f"{found}\n{run.cluster.log()}"
            assert [words for node in run.cluster.nodes for words in node.unclean] == []
            assert await used_pages(run.client) == 0

    asyncio.run(scenario())
