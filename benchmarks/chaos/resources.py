"""What a process holds: memory, descriptors, threads. From /proc, so on Linux only."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.chaos.cluster import ChaosCluster
from grokmoe import AsyncClient, WorkerRole


@dataclasses.dataclass(frozen=True)
class Holding:
    """Of one process. rss: MiB. num_starts: how often its slot has been filled; a new process begins anew."""

    name: str
    num_starts: int
    rss: float
    descriptors: int
    threads: int


def holdings(cluster: ChaosCluster) -> list[Holding]:
    """Of every process of ours; a proxy is none of the service."""
    return [
        _of(node.name, node.num_starts, node.pid) for node in cluster.nodes if node.role != "proxy" and node.is_running
    ]


def _of(name: str, num_starts: int, pid: int) -> Holding:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Holding(name, num_starts, int(status["VmRSS"].split()[0]) / 1024, descriptors, int(status["Threads"]))


async def used_pages(client: AsyncClient) -> int:
    """KV pages that live sequences hold; none when nobody asks for anything."""
    workers = (await client.status()).workers
    return sum(worker.used_pages for worker in workers if worker.role is WorkerRole.ATTENTION)
