"""What clients will see: a simulation of one attention worker with its part of the load, summed up."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np

from planner.arrivals import Load, draw
from planner.bounds import Goals, Limits
from planner.device import GIB
from planner.model_size import kv_bytes
from planner.shape import StepShape, mean_shape
from planner.simulation import Served, Simulated, simulate
from planner.step_time import StepTimer
from router.step import SchedulerSettings

PAGE_SIZE = 32
"""Positions of a page, as attention workers are started with."""

MEASURED = (0.1, 0.9)
"""Shares of the schedule that count, as in a load test."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Seconds; throughputs of the whole cluster. share: of the requests that meet the goals. busy: share of the time in
    which the attention worker's lanes had a step; batch: rows of a step; preemptions: of one worker."""

    rate: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    share: float
    holds: bool
    output_rate: float
    total_rate: float
    busy: float
    batch: float
    preemptions: int


def kv_tokens(timer: StepTimer) -> int:
    """Positions that the pages of one attention worker hold."""
    cluster = timer.cluster
    return math.floor(cluster.kv_gib * GIB / kv_bytes(cluster.config, cluster.dtype))


def forecast(timer: StepTimer, load: Load, limits: Limits, goals: Goals, num_requests: int, seed: int) -> Forecast:
    """Raises InvalidRequest when a request never fits."""
    cluster = timer.cluster
    workers = cluster.attention_workers
    settings = SchedulerSettings(
        context_length=cluster.config.context_length,
        max_step_tokens=limits.max_step_tokens,
        max_running=limits.max_running,
        num_lanes=cluster.lanes,
        min_lane_rows=limits.min_lane_rows,
    )
    num_pages = kv_tokens(timer) // PAGE_SIZE
    most = min(cluster.config.context_length, num_pages * PAGE_SIZE)
    part = dataclasses.replace(load, rate=load.rate / workers)
    arrivals = draw(part, num_requests, seed, most)

    def run(others: StepShape | None) -> Simulated:
        return simulate(
            arrivals,
            settings,
            num_pages,
            PAGE_SIZE,
            lambda shape, here: timer.in_flight(shape, here, here * workers, others),
        )

    found = run(None)
    if workers * cluster.lanes > 1:  # what the steps of others are like is known now: like those of this worker
        found = run(mean_shape([shape for shape, _ in found.steps]))
    begin, end = (share * arrivals[-1].time for share in MEASURED)
    counted = [each for each in found.served if begin <= each.arrival.time <= end] or found.served
    good = sum(is_good(each, goals) for each in counted) / len(counted)
    ttfts = [each.ttft for each in counted if each.ttft is not None]
    tpots = [each.tpot for each in counted if each.tpot is not None] or [0.0]
    tokens = sum(each.tokens for each in found.served)
    prompts = sum(each.arrival.prompt for each in found.served)
    return Forecast(
        rate=load.rate,
        ttft_p50=float(np.percentile(ttfts, 50)),
        ttft_p99=float(np.percentile(ttfts, 99)),
        tpot_p50=float(np.percentile(tpots, 50)),
        tpot_p99=float(np.percentile(tpots, 99)),
        share=good,
        holds=good >= goals.share,
        output_rate=workers * tokens / found.end,
        total_rate=workers * (tokens + prompts) / found.end,
        busy=min(1.0, sum(seconds for _, seconds in found.steps) / found.end / cluster.lanes),
        batch=statistics.mean(shape.rows for shape, _ in found.steps),
        preemptions=found.preemptions,
    )


def is_good(served: Served, goals: Goals) -> bool:
    """Whether a request meets the goals; one of a single token has no time per token."""
    return served.ttft is not None and served.ttft <= goals.ttft and (served.tpot or 0.0) <= goals.tpot
