"""From what happened in a simulation to what it shows: latencies, throughput, what was busy, what failures did."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from planner.forecast import MEASURED, is_good
from planner.simulated.failures import Failure
from planner.simulated.requests import Tracked
from planner.simulated.results import Effect, Outcome
from planner.simulated.world import World

Floats = npt.NDArray[np.float64]

SPAN = 0.5
"""Seconds over which tokens are counted when a dip is looked for."""

RECOVERED = 0.9
"""Share of the tokens/s before a failure that counts as back, as in a load test."""


def outcome_of(world: World, took: float) -> Outcome:
    """Latencies are of the requests that came in the middle of the time, as in a load test."""
    scenario, requests = world.scenario, list(world.requests.values())
    last = max(each.arrival.time for each in requests)
    begin, end = (share * last for share in MEASURED)
    counted = [each for each in requests if begin <= each.arrival.time <= end] or requests
    good = sum(each.is_over and is_good(each, scenario.goals) for each in counted) / len(counted)
    ttfts = [each.ttft + scenario.costs.router.per_request for each in counted if each.ttft is not None] or [np.inf]
    tpots = [each.tpot for each in counted if each.tpot is not None] or [0.0]
    workers = [worker for cell in world.cells for worker in cell.workers]
    steps = sum(worker.num_steps for worker in workers)
    now = world.clock.now
    tokens = world.tokens
    return Outcome(
        seconds=now,
        took=took,
        num_events=world.clock.num_events,
        num_steps=steps,
        requests=len(requests),
        unfinished=sum(not each.is_over for each in requests),
        ttft_p50=float(np.percentile(ttfts, 50)),
        ttft_p99=float(np.percentile(ttfts, 99)),
        tpot_p50=float(np.percentile(tpots, 50)),
        tpot_p99=float(np.percentile(tpots, 99)),
        share=good,
        holds=good >= scenario.goals.share,
        output_rate=sum(begin <= time <= end for time in tokens) / (end - begin),
        mean_rows=sum(worker.num_rows for worker in workers) / max(1, steps),
        busy={
            "attention": _shares([worker.device.busy for worker in workers], now),
            "router": _shares([cell.process.busy for cell in world.cells], now),
            "link": _shares([link.busy for cell in world.cells for link in cell.links], now),
            "experts": _shares([each.busy for each in world.experts], now),
        },
        retries=sum(worker.num_retries for worker in workers),
        moves=sum(each.num_moves for each in requests),
        effects=tuple(_effect(each, requests, np.array(tokens), last) for each in world.failures),
    )


def _shares(busy: Sequence[float], seconds: float) -> tuple[float, float]:
    return float(np.mean(busy)) / seconds, max(busy) / seconds


def _effect(failure: Failure, requests: Sequence[Tracked], times: Floats, last: float) -> Effect:
    hit = [each for each in requests if each.arrival.time <= failure.at and (each.last or np.inf) > failure.at]
    stalls = [each.longest_gap for each in hit if each.gap_ended >= failure.at]
    before = float(np.sum((times >= failure.at / 2) & (times < failure.at))) / max(failure.at / 2, 1e-9)
    num_spans = int((last - failure.at) / SPAN)
    edges = failure.at + SPAN * np.arange(num_spans + 1)
    dip = recovered = None
    if before and num_spans:
        rates = np.histogram(times, edges)[0] / SPAN / before
        dip = float(rates.min())
        back = np.flatnonzero(rates >= RECOVERED)
        recovered = float(back[0]) * SPAN if len(back) else None
    return Effect(failure, len(hit), max(stalls, default=0.0), dip, recovered)
