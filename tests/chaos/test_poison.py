"""A request that kills every worker process that computes it ends alone; those beside it lose nothing."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.chaos.campaign import campaign
from benchmarks.chaos.cluster import ClusterPlan
from benchmarks.chaos.load import make_jobs
from benchmarks.chaos.node import Node
from grokmoe.errors import Unavailable
from tests.chaos.poisoned_worker import POISON

pytestmark = pytest.mark.cluster

PLAN = ClusterPlan(attention=2, experts=2, replicas=2, attention_module="tests.chaos.poisoned_worker", max_migrations=3)


async def keep_running(node: Node) -> None:
    """Starts the process again whenever it ends, as an orchestrator would."""
    while True:
        await node.wait_ended()
        await node.start()


def test_only_the_poison_ends() -> None:
    async def scenario() -> None:
        jobs = [job for job in make_jobs(8, 2048, 3, longest=64) if job.prompt[0] != POISON[0]]
        async with campaign(PLAN, jobs, None, concurrency=4, seed=3) as run:
            workers = run.cluster.of("attention")
            keepers = [asyncio.create_task(keep_running(worker)) for worker in workers]
            await run.load.wait_decoding(3)
            with pytest.raises(Unavailable, match="lost 4 times"):
                await run.client.generate(POISON, max_tokens=4, text=False, timeout=120.0)
            assert sum(worker.num_starts for worker in workers) >= 2 + 3, "it has killed as often as it may"
            assert await run.cluster.wait_whole(run.client, 60.0) is not None
            for keeper in keepers:
                keeper.cancel()
            await run.load.finish()
            complaints = [outcome for outcome in run.load.outcomes if outcome.error or outcome.changed_at is not None]
            assert not complaints, f"{complaints}\n{run.cluster.log()}"

    asyncio.run(scenario())
