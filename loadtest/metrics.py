"""The figures of a run, from its records. `loadtest/explain.py` says in words what each is."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from loadtest import statistics
from loadtest.latencies import PER_REQUEST, cancel, itls
from loadtest.record import Outcome, RequestRecord
from loadtest.slo import Slo
from loadtest.window import Window

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


@dataclasses.dataclass(frozen=True)
class Selected:
    """The records of a window: those scheduled in it, whenever they ended."""

    records: tuple[RequestRecord, ...]
    window: Window

    def values(self, name: str) -> list[float]:
        """Seconds of one latency: of each request that has it; of `itl` each gap of each request."""
        if name == "itl":
            return [gap for record in self.records for gap in itls(record)]
        latency = cancel if name == "cancel" else PER_REQUEST[name]
        return [value for record in self.records if (value := latency(record)) is not None]


def select(records: Sequence[RequestRecord], window: Window) -> Selected:
    """The records scheduled in the window."""
    return Selected(tuple(record for record in records if window.has(record.scheduled)), window)


def key(percentile: float) -> str:
    """p50, p99.9."""
    return f"p{percentile:g}"


def summarize(name: str, values: Sequence[float], percentiles: Sequence[float] = PERCENTILES) -> dict[str, float]:
    """`mean_ttft_ms` and the like, in milliseconds; empty without values."""
    if not values:
        return {}
    values_N = np.asarray(values) * 1e3
    summary = {
        f"mean_{name}_ms": float(values_N.mean()),
        f"median_{name}_ms": float(np.median(values_N)),
        f"std_{name}_ms": float(values_N.std()),
    }
    shares = np.percentile(values_N, percentiles)
    return summary | {f"{key(p)}_{name}_ms": float(value) for p, value in zip(percentiles, shares, strict=True)}


def intervals(
    name: str, values: Sequence[float], percentiles: Sequence[float] = PERCENTILES, seed: int = 0
) -> dict[str, list[float]]:
    """95 % intervals for the means and percentiles of `summarize`, by the same names, in milliseconds."""
    chosen = {f"mean_{name}_ms": statistics.mean, f"median_{name}_ms": statistics.percentile(50)}
    chosen |= {f"{key(p)}_{name}_ms": statistics.percentile(p) for p in percentiles}
    found = {}
    for which, statistic in chosen.items():
        if (interval := statistics.interval(values, statistic, seed)) is not None:
            found[which] = [interval.low * 1e3, interval.high * 1e3]
    return found


def throughput(records: Sequence[RequestRecord], window: Window) -> dict[str, float]:
    """Tokens and requests by when they came, whoever was scheduled when."""
    ended = [each for each in records if each.outcome is Outcome.COMPLETED and window.has(each.end)]
    num_output = sum(
        count
        for record in records
        for arrival, count in zip(record.arrivals, record.counts, strict=True)
        if window.has(arrival)
    )
    num_input = sum(record.input_len for record in ended)
    return {
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(ended) / window.seconds,
        "output_throughput": num_output / window.seconds,
        "total_token_throughput": (num_input + num_output) / window.seconds,
        "max_output_tokens_per_s": max(tokens_per_second(records, window), default=0.0),
        "max_concurrent_requests": peak_concurrency(records, window),
    }


def tokens_per_second(records: Sequence[RequestRecord], window: Window, step: float = 1.0) -> list[float]:
    """Output tokens in each span of `step` seconds of the window; what is left over at its end is left out."""
    num_steps = int(window.seconds / step)
    counts = [0.0] * num_steps
    for record in records:
        for arrival, count in zip(record.arrivals, record.counts, strict=True):
            which = int((arrival - window.begin) // step)
            if 0 <= which < num_steps:
                counts[which] += count / step
    return counts


def concurrency(records: Sequence[RequestRecord]) -> list[tuple[float, int]]:
    """(time, requests under way from then on), at every change."""
    changes: collections.Counter[float] = collections.Counter()
    for record in records:
        changes[record.sent] += 1
        changes[record.end] -= 1
    times = sorted(changes)
    return list(zip(times, itertools.accumulate(changes[time] for time in times), strict=True))


def peak_concurrency(records: Sequence[RequestRecord], window: Window) -> int:
    """Most requests under way at one time of the window."""
    levels = concurrency(records)
    inside = [level for time, level in levels if window.has(time)]
    before = [level for time, level in levels if time < window.begin]
    return max(inside + before[-1:], default=0)


def outcomes(selected: Selected) -> dict[str, Any]:
    """How the requests ended; failures also by code and reason."""
    counts = collections.Counter(record.outcome for record in selected.records)
    failed = [record for record in selected.records if record.outcome is Outcome.FAILED]
    return {
        "scheduled": len(selected.records),
        **{outcome.value: counts[outcome] for outcome in Outcome},
        "errors_by_code": dict(collections.Counter(record.code for record in failed)),
        "errors_by_reason": dict(collections.Counter(record.reason for record in failed)),
    }


def goodput(selected: Selected, slo: Slo) -> dict[str, Any]:
    """Good requests per second, and whether the objectives hold."""
    num_good = sum(map(slo.is_good, selected.records))
    return {
        "request_goodput": num_good / selected.window.seconds,
        "slo_attained": slo.attained(selected.records),
        "slo_holds": slo.holds(selected.records),
    }


def schedule_lag(records: Sequence[RequestRecord]) -> dict[str, float]:
    """How late the harness was itself, over the whole run."""
    lags_N = np.asarray([record.lag for record in records]) * 1e3
    if not len(lags_N):
        return {}
    p50, p99 = np.percentile(lags_N, [50, 99])
    return {
        "median_schedule_lag_ms": float(p50),
        "p99_schedule_lag_ms": float(p99),
        "max_schedule_lag_ms": float(lags_N.max()),
    }


def measure(
    records: Sequence[RequestRecord], window: Window, slo: Slo, percentiles: Sequence[float] = PERCENTILES
) -> dict[str, Any]:
    """All of it for one window, without intervals. The names that vLLM's benchmark has too mean the same."""
    selected = select(records, window)
    figures = {
        "duration": window.seconds,
        "window": [window.begin, window.end],
        **outcomes(selected),
        **throughput(records, window),
        **goodput(selected, slo),
    }
    for name in (*PER_REQUEST, "itl", "cancel"):
        figures |= summarize(name, selected.values(name), percentiles)
    return figures
