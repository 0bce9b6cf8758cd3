"""The highest rate of a cluster without a clock: a batch that stays as large as it is, its steps all alike.

A sequence of P + O tokens is in about O steps, and while n sequences decode, each step also has n P / O tokens of
prompts. So a lane with n sequences completes n / (O t(n)) requests a second, where t(n) is the time of such a step with
all other lanes and workers under way. The rate is highest at the largest n whose step keeps within the objectives.
"""

from __future__ import annotations

import dataclasses
import math

from planner.shape import StepShape
from planner.step_time import StepTimer


@dataclasses.dataclass(frozen=True)
class Goals:
    """Seconds, and the share of the requests that must meet both."""

    ttft: float
    tpot: float
    share: float


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a router is told."""

    max_step_tokens: int
    max_running: int
    min_lane_rows: int


@dataclasses.dataclass(frozen=True)
class Bound:
    """rate: requests/s of the whole cluster. batch: sequences of a lane. step: seconds of a step, which is the time per
    token. ttft: seconds without a queue. binding: what the step waits for."""

    rate: float
    batch: int
    step: float
    ttft: float
    binding: str


def steady_shape(batch: int, prompt: float, output: float) -> StepShape:
    """A step of a lane whose batch is replaced as it is used up."""
    share = batch / output
    context = prompt + output / 2
    return StepShape(
        rows=max(1, round(batch + share * prompt)),
        sequences=max(1, round(batch + share)),
        draws=max(1, round(batch + share)),
        attended=batch * context + share * prompt * prompt / 2,
        read=batch * context + share * prompt,
    )


def bound(timer: StepTimer, prompt: float, output: float, limits: Limits, kv_tokens: float, goals: Goals) -> Bound:
    """A rate of 0: no batch keeps within the goals. kv_tokens: positions that one attention worker has pages for."""
    cluster = timer.cluster
    lanes = cluster.lanes
    most = min(limits.max_running, kv_tokens / (prompt + output)) / lanes
    most = min(most, limits.max_step_tokens / (1 + prompt / output))
    best = None
    for batch in batches(max(1, math.floor(most))):
        if lanes > 1 and batch < limits.min_lane_rows:
            continue  # the scheduler makes one lane of it
        shape = steady_shape(batch, prompt, output)
        step = timer.in_flight(shape, lanes, lanes * cluster.attention_workers)
        ttft = step * (1.5 + prompt / limits.max_step_tokens)
        holds = step <= goals.tpot and ttft <= goals.ttft
        rate = lanes * cluster.attention_workers * batch / (output * step) if holds else 0.0
        if best is None or rate > best.rate:
            name = timer.binding(shape, lanes, lanes * cluster.attention_workers)
            best = Bound(rate, batch, step, ttft, name)
    return best or Bound(0.0, 0, math.inf, math.inf, "lanes")


def batches(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to `most`."""
    found, value = {most}, 1
    while value <= most:
        found |= {value, min(most, value * 3 // 2)}
        value *= 2
    return sorted(found)
