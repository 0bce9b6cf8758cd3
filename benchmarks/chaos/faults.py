"""What can be done to a node. Each fault ends as it began: with a node that works.

kill        kill -9; started again after a while
hang        SIGSTOP for a while, then SIGCONT
restart     SIGTERM: it drains and ends; started again
fulldisk    kill, in a cluster whose processes all log to a full disk
partition   its network cable is pulled out for a while; nobody is told
drop        its connections end, and no new one is taken for a while
slow        every answer takes half a second longer for a while
late        one answer comes seconds later than it should, others pass it
duplicate   every answer comes twice for a while
nan         three answers hold NaN
shape       three answers have the wrong shape
garbage     an answer is random bytes
killrank    kill -9 of a rank that serves nobody itself; its worker, which ends with it, is started again
hangrank    SIGSTOP of such a rank for a while, then SIGCONT
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable

from benchmarks.chaos.cluster import ChaosCluster
from benchmarks.chaos.node import Node

SLOW = 0.5
"""Seconds that a slow worker's answer takes longer: twice the shortest deadline of an expert call."""

LATE = 1.5
"""Seconds that a late answer is late: several times the deadline of the call, and of the call that was sent instead."""

AWAY = (0.0, 0.3)
"""Seconds between the end of a process and the start of the next one; the start itself takes longer."""

SILENT = (0.6, 1.5)
"""Seconds of a hang or a partition: longer than the deadlines of a worker that is known, so that it is noticed."""

SPOILT = (0.8, 1.5)
"""Seconds in which every answer is spoilt."""

FEW = 1.0
"""Most seconds in which so many answers are to come that are spoilt by number."""

POLL = 0.02
"""Seconds between two looks at whether they have come."""


NUM_LAST_LINES = 20
"""Of the log of a process that did not end cleanly."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a kind needs around it. Kinds with equal needs share a cluster."""

    is_proxied: bool = False
    has_cables: bool = False
    is_disk_full: bool = False
    has_ranks: bool = False


Inject = Callable[[ChaosCluster, Node, random.Random], Awaitable[bool]]
"""Does it, and returns when it is over; False if it had no effect."""


async def kill(cluster: ChaosCluster, node: Node, draw: random.Random) -> bool:
    """See the table."""
    await node.kill()
    await asyncio.sleep(draw.uniform(*AWAY))
    await node.start()
    return True


async def hang(cluster: ChaosCluster, node: Node, draw: random.Random) -> bool:
    """See the table."""
    node.signal(signal.SIGSTOP)
    await asyncio.sleep(draw.uniform(*SILENT))
    node.signal(signal.SIGCONT)
    return True


async def restart(cluster: ChaosCluster, node: Node, draw: random.Random) -> bool:
    """See the table."""
    node.signal(signal.SIGTERM)
    if code := await node.wait_ended():
        node.unclean.append("\n".join([f"code {code}", *list(node.lines)[-NUM_LAST_LINES:]]))
    await node.start()
    return True


async def rolling(cluster: ChaosCluster, node: Node, draw: random.Random) -> bool:
    """See the table. Goes on when the node that was restarted is ready, as an orchestrator would."""
    for each in (cluster.router, *cluster.workers):
        await restart(cluster, each, draw)
    return True


async def kill_rank(cluster: ChaosCluster, node: Node, draw: random.Random) -> bool:
    """See the table."""
    os.kill(draw.choice(node.rank_pids), signal.SIGKILL)
    await node.wait_ended()
    await asyncio.sleep(draw.uniform(*AWAY))
    await node.start()
    return True


async def hang_rank(cluster: ChaosCluster, node: Node, draw: random.Random) -> bool:
    """See the table."""
    rank = draw.choice(node.rank_pids)
    os.kill(rank, signal.SIGSTOP)
    await asyncio.sleep(draw.uniform(*SILENT))
    os.kill(rank, signal.SIGCONT)
    return True


async def partition(cluster: ChaosCluster, node: Node, draw: random.Random) -> bool:
    """See the table."""
    cluster.cables.plug(node.namespace, False)
    try:
        await asyncio.sleep(draw.uniform(*SILENT))
    finally:
        cluster.cables.plug(node.namespace, True)
    return True


async def drop(cluster: ChaosCluster, node: Node, draw: random.Random) -> bool:
    """See the table."""
    assert cluster.control is not None
    await cluster.control.set(node.address, "drop")
    await asyncio.sleep(draw.uniform(0.0, 1.0))
    await cluster.control.set(node.address, "open")
    return True


def spoil_for_a_while(kind: str, seconds: float = 0.0) -> Inject:
    """Every answer, for a while."""

    async def inject(cluster: ChaosCluster, node: Node, draw: random.Random) -> bool:
        assert cluster.control is not None
        await cluster.control.set(node.address, kind, seconds)
        await asyncio.sleep(draw.uniform(*SPOILT))
        return await cluster.control.set(node.address, "") > 0

    return inject


def spoil_some(kind: str, count: int, seconds: float = 0.0) -> Inject:
    """So many answers, or as many as come within a second."""

    async def inject(cluster: ChaosCluster, node: Node, draw: random.Random) -> bool:
        assert cluster.control is not None
        await cluster.control.set(node.address, kind, seconds, count)
        over = time.monotonic() + FEW
        while time.monotonic() < over and await cluster.control.left(node.address):  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(POLL)
        await asyncio.sleep(seconds)
        return await cluster.control.set(node.address, "") > 0

    return inject


@dataclasses.dataclass(frozen=True)
class Fault:
    """One kind."""

    inject: Inject
    needs: Setting = Setting()


PROXIED = Setting(is_proxied=True)

FAULTS: dict[str, Fault] = {
    "kill": Fault(kill),
    "hang": Fault(hang),
    "restart": Fault(restart),
    "rolling": Fault(rolling),
    "fulldisk": Fault(kill, Setting(is_disk_full=True)),
    "partition": Fault(partition, Setting(has_cables=True)),
    "drop": Fault(drop, PROXIED),
    "slow": Fault(spoil_for_a_while("slow", SLOW), PROXIED),
    "late": Fault(spoil_some("late", 1, LATE), PROXIED),
    "duplicate": Fault(spoil_for_a_while("duplicate"), PROXIED),
    "nan": Fault(spoil_some("nan", 3), PROXIED),
    "shape": Fault(spoil_some("shape", 3), PROXIED),
    "garbage": Fault(spoil_some("garbage", 1), PROXIED),
    "killrank": Fault(kill_rank, Setting(has_ranks=True)),
    "hangrank": Fault(hang_rank, Setting(has_ranks=True)),
}
"""Kind -> fault."""

ALL = "all"
"""The target of `rolling`."""

TARGETS = ("expert", "attention", "router", ALL)
"""Roles. A router is killed, hung and restarted; it is behind no proxy and no cable."""


def is_possible(kind: str, target: str) -> bool:
    """Whether a kind can be done to a role."""
    if target == ALL or kind == "rolling":
        return target == ALL and kind == "rolling"
    if FAULTS[kind].needs.has_ranks:
        return target == "attention"
    return target != "router" or FAULTS[kind].needs in (Setting(), Setting(is_disk_full=True))
