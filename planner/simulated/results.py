"""What a simulation has shown, as it is told."""

from __future__ import annotations

import dataclasses

from planner.simulated.failures import Failure


@dataclasses.dataclass(frozen=True)
class Effect:
    """Of a failure. under_way: requests when it happened. longest_stall: seconds without a token of a request that it
    or what followed from it held up. dip: lowest share of the tokens/s before it; None: nothing came before."""

    failure: Failure
    under_way: int
    longest_stall: float
    dip: float | None
    recovered_after: float | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """seconds: simulated; took: of the simulation itself. unfinished: requests that never ended. mean_rows: of a step.
    busy: share of the time by resource, the mean of those alike and the busiest. retries: expert calls that were sent
    again. moves: times that a sequence lost its attention worker."""

    seconds: float
    took: float
    num_events: int
    num_steps: int
    requests: int
    unfinished: int
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    share: float
    holds: bool
    output_rate: float
    mean_rows: float
    busy: dict[str, tuple[float, float]]
    retries: int
    moves: int
    effects: tuple[Effect, ...]
