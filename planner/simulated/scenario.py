"""What is simulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from grokmoe.errors import ConfigError
from planner.arrivals import Load
from planner.bounds import Goals, Limits
from planner.cluster import Cluster
from planner.costs import Costs
from planner.simulated.failures import Failure

NOTICED_AFTER = 0.01
"""Seconds until a worker that died is missed: its connections end with it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenario:
    """seconds: in which requests come. skew: of the routing, see Routing. reach: copies of the experts that a router
    reaches; 0: all. noticed_after: seconds from a failure to its being known."""

    cluster: Cluster
    costs: Costs
    load: Load
    limits: Limits
    goals: Goals
    seconds: float
    seed: int = 0
    skew: float = 0.0
    reach: int = 0
    failures: tuple[Failure, ...] = ()
    noticed_after: float = NOTICED_AFTER

    def __post_init__(self) -> None:
        if self.cluster.is_fused or self.cluster.host is not None:
            raise ConfigError("a simulation is of workers with devices of their own, over a network")
        counts = worker_counts(self.cluster)
        for failure in self.failures:
            if failure.index >= counts[failure.role]:
                raise ConfigError(f"failure of {failure.role} {failure.index}: there are {counts[failure.role]}")


def worker_counts(cluster: Cluster) -> Mapping[str, int]:
    """By role. Where the router is inside the attention worker, both are one process: an attention worker."""
    routers = 0 if cluster.has_router_inside else cluster.routers
    return {"expert": cluster.num_cards, "attention": cluster.attention_workers, "router": routers}
