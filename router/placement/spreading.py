"""A placement to start with: every expert on some of the workers, as evenly as can be."""

from __future__ import annotations

from grokmoe.errors import ConfigError


def spread(num_experts: int, num_workers: int, num_replicas: int = 1) -> tuple[tuple[int, ...], ...]:
    """Places every expert on `num_replicas` of the workers, as evenly as can be.

    Returns the experts of each worker, ascending. Neighbouring experts share a worker, and each further replica is
    on the next worker (chained declustering): the load of a lost worker falls on several others.
    Raises ConfigError when there are more replicas than workers, or workers that would hold nothing.
    """
    if num_workers < 1 or num_replicas < 1:
        raise ConfigError(f"experts need at least one worker and one replica, not {num_workers} and {num_replicas}")
    if num_replicas > num_workers:
        raise ConfigError(f"{num_replicas} replicas of an expert need as many workers, there are {num_workers}")
    if num_workers > num_experts * num_replicas:
        raise ConfigError(
            f"{num_workers} workers for {num_experts} experts x {num_replicas} replicas: some would hold nothing"
        )
    held: list[set[int]] = [set() for _ in range(num_workers)]
    for expert in range(num_experts):
        first = expert * num_workers // num_experts
        for replica in range(num_replicas):
            held[(first + replica) % num_workers].add(expert)
    return tuple(tuple(sorted(experts)) for experts in held)
