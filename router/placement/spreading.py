"""A placement to start with: every expert on some of the workers, as evenly as can be."""

from __future__ import annotations

from grokmoe.errors import ConfigError
from grokmoe.expert_units import unit_of


def spread(
    num_experts: int, num_workers: int, num_replicas: int = 1, num_slices: int = 1
) -> tuple[tuple[int, ...], ...]:
    """Places every expert, or each of its slices, on `num_replicas` of the workers, as evenly as can be.

    Returns the units of each worker, ascending. Neighbouring experts share a worker, the slices of one are on different
    workers where there are as many, and each further replica is on the next worker (chained declustering): the load of
    a lost worker falls on several others.
    Raises ConfigError when there are more replicas than workers, or workers that would hold nothing.
    """
    if num_workers < 1 or num_replicas < 1:
        raise ConfigError(f"experts need at least one worker and one replica, not {num_workers} and {num_replicas}")
    if num_replicas > num_workers:
        raise ConfigError(f"{num_replicas} replicas of an expert need as many workers, there are {num_workers}")
    num_units = num_experts * num_slices
    if num_workers > num_units * num_replicas:
        what = f"{num_experts} experts" + (f" x {num_slices} slices" if num_slices > 1 else "")
        raise ConfigError(f"{num_workers} workers for {what} x {num_replicas} replicas: some would hold nothing")
    held: list[set[int]] = [set() for _ in range(num_workers)]
    # First the first slice of all experts, then the second: those of one expert are as far apart as can be.
    for number, (index, expert) in enumerate((i, e) for i in range(num_slices) for e in range(num_experts)):
        first = number * num_workers // num_units
        for replica in range(num_replicas):
            held[(first + replica) % num_workers].add(unit_of(expert, index, num_slices))
    return tuple(tuple(sorted(units)) for units in held)
