"""A request before it is sent, and the plan of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from grokmoe.errors import ConfigError
from loadtest.arrivals import Times


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """What is asked. prompt: text or token ids. arrival: seconds in the trace it comes from, if it comes from one."""

    prompt: str | tuple[int, ...]
    max_tokens: int
    arrival: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedRequest:
    """An input and its time, seconds from the start of the run.

    leave_after: the client leaves the stream after so many tokens; None: it stays to the end.
    """

    index: int
    at: float
    prompt: str | tuple[int, ...]
    max_tokens: int
    leave_after: int | None = None


def plan_requests(
    inputs: Sequence[Input], times_N: Times, leave_share: float = 0.0, seed: int = 0
) -> list[PlannedRequest]:
    """Puts inputs and times together. leave_share: of the streams, so many are left at a random token."""
    if not 0 <= leave_share <= 1:
        raise ConfigError(f"cancel_share is {leave_share}, must be in [0, 1]")
    rng = np.random.default_rng((seed, 1))
    leaves = rng.random(len(inputs)) < leave_share
    where = rng.random(len(inputs))
    return [
        PlannedRequest(
            index,
            float(at),
            each.prompt,
            each.max_tokens,
            1 + int(share * (each.max_tokens - 1)) if leave else None,
        )
        for index, (each, at, leave, share) in enumerate(zip(inputs, times_N, leaves, where, strict=True))
    ]


def split(plan: Sequence[PlannedRequest], num_parts: int) -> list[list[PlannedRequest]]:
    """One part per load process: every `num_parts`-th request, so that each part has the whole run's shape."""
    return [list(plan[part::num_parts]) for part in range(num_parts)]
