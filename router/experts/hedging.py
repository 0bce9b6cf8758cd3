"""A second holder for a call that takes unusually long: the first answer wins, the other call is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from router.dispatch import Shard
from router.experts.counters import ExpertCounters
from router.experts.latency import Latency
from router.experts.member import ExpertMember
from router.experts.members import ExpertMembers
from router.experts.settings import ExpertPoolSettings
from router.placement import NOBODY
from router.transport.base import ExpertReply

Call = Callable[[ExpertMember], Coroutine[Any, Any, ExpertReply]]
"""Sends the rows to that worker."""


def hedge_after(
    latency: Latency, num_rows: int, counters: ExpertCounters, settings: ExpertPoolSettings
) -> float | None:
    """Seconds after which a call gets a second holder. None: never, or the share of hedged calls is used up."""
    if not settings.hedge_quantile or counters.hedges + 1 > settings.hedge_share * counters.calls:
        return None
    return latency.quantile(num_rows, settings.hedge_quantile)


def second_holder(members: ExpertMembers, layer: int, shard: Shard, first: ExpertMember) -> ExpertMember | None:
    """Another worker that holds all experts of a shard; None when no single one does."""
    chosen = members.choose(layer, (first.index,))
    workers = {chosen.get(each, NOBODY) for each in shard.expert_ids}
    return members.find(workers.pop()) if len(workers) == 1 else None


async def hedged(
    call: Call,
    first: ExpertMember,
    find_second: Callable[[], ExpertMember | None],
    seconds: float,
    counters: ExpertCounters,
) -> ExpertReply:
    """Calls `first`, and after `seconds` without an answer a second worker, too. Raises what the last of them raises.

    Both calls leave their traces (state, latency) of themselves; the loser's answer is discarded by its id.
    """
    tasks = [asyncio.ensure_future(call(first))]
    try:
        await asyncio.wait(tasks, timeout=seconds)
        second = None if tasks[0].done() else find_second()
        if second is None:
            return await tasks[0]
        counters.hedges += 1
        tasks.append(asyncio.ensure_future(call(second)))
        pending = set(tasks)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            good = [task for task in tasks if task in done and task.exception() is None]
            if good:
                if good[0] is tasks[1]:
                    counters.hedges_won += 1
                else:
                    counters.hedges_lost += 1
                return good[0].result()
        counters.hedges_lost += 1
        return tasks[0].result()
    finally:
        for task in tasks:
            if not task.done():
                task.cancel()
            task.add_done_callback(_retrieve)


def _retrieve(task: asyncio.Task[ExpertReply]) -> None:
    """An exception that nobody waits for is no bug here."""
    if not task.cancelled():
        task.exception()
