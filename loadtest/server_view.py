"""What the server's metrics say of a span of time: differences of counters, means of gauges, rows per expert."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from loadtest.scrape import Key, Reading

EXPERT_ROWS = "grokmoe_expert_rows_total"
"""The router's count of rows per expert; without a router among the endpoints, the workers' own."""

WORKER_ROWS = "grokmoe_expert_worker_rows_total"

SERIES = ("grokmoe_requests_running", "grokmoe_requests_waiting", "grokmoe_kv_pages")
"""Gauges that are drawn over time."""


def view(readings: Mapping[str, Sequence[Reading]], begin: float, window: tuple[float, float]) -> dict[str, Any]:
    """For the result.

    begin: of the run, on the readings' clock. window: seconds of the run. `endpoints` sums each endpoint up over the
    window; `series` and `experts` are of the whole run.
    """
    endpoints = {url: _endpoint(_inside(each, begin + window[0], begin + window[1])) for url, each in readings.items()}
    return {"endpoints": endpoints, "series": _series(readings, begin), "experts": _experts(readings, begin)}


def _inside(readings: Sequence[Reading], begin: float, end: float) -> Sequence[Reading]:
    """Those of the span, with the last before and the first after it."""
    first = max((index for index, each in enumerate(readings) if each.time <= begin), default=0)
    last = min((index for index, each in enumerate(readings) if each.time >= end), default=len(readings) - 1)
    return readings[first : last + 1]


def _endpoint(readings: Sequence[Reading]) -> dict[str, Any]:
    if len(readings) < 2:
        return {}
    first, last = readings[0], readings[-1]
    summary: dict[str, Any] = {"seconds": last.time - first.time, "counters": {}, "gauges": {}, "histograms": {}}
    for (name, labels), value in last.values.items():
        family = name.removesuffix("_total").removesuffix("_sum").removesuffix("_count").removesuffix("_bucket")
        kind = last.kinds.get(name) or last.kinds.get(family)
        if kind == "counter" and name.endswith("_total"):
            summary["counters"][_shown(name, labels)] = value - first.values.get((name, labels), 0.0)
        elif kind == "gauge":
            values = [each.values[name, labels] for each in readings if (name, labels) in each.values]
            summary["gauges"][_shown(name, labels)] = {"mean": sum(values) / len(values), "max": max(values)}
        elif kind == "histogram" and name.endswith("_count"):
            found = _histogram(first, last, family, labels)
            if found:
                summary["histograms"][_shown(family, labels)] = found
    return summary


def _histogram(first: Reading, last: Reading, family: str, labels: tuple[tuple[str, str], ...]) -> dict[str, float]:
    def grown(name: str, of: tuple[tuple[str, str], ...]) -> float:
        return last.values.get((name, of), 0.0) - first.values.get((name, of), 0.0)

    count = grown(f"{family}_count", labels)
    if count <= 0:
        return {}
    buckets = []
    for name, of in last.values:
        rest = tuple(label for label in of if label[0] != "le")
        if name == f"{family}_bucket" and rest == labels:
            buckets.append((float(dict(of)["le"]), grown(name, of)))
    buckets.sort()
    return {
        "count": count,
        "mean": grown(f"{family}_sum", labels) / count,
        "p50": quantile(buckets, 0.5),
        "p99": quantile(buckets, 0.99),
    }


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float:
    """Of a histogram's (upper edge, values up to it), linear inside a bucket; of the last its lower edge."""
    rank = share * buckets[-1][1]
    low_edge = low_count = 0.0
    for edge, count in buckets:
        if count >= rank:
            if math.isinf(edge) or count == low_count:
                return low_edge
            return low_edge + (edge - low_edge) * (rank - low_count) / (count - low_count)
        low_edge, low_count = edge, count
    return low_edge


def _series(readings: Mapping[str, Sequence[Reading]], begin: float) -> dict[str, list[list[float]]]:
    """Name to [seconds of the run, value]."""
    series: dict[str, list[list[float]]] = {}
    for each in itertools.chain.from_iterable(readings.values()):
        for (name, labels), value in each.values.items():
            if name in SERIES:
                series.setdefault(_shown(name, labels), []).append([each.time - begin, value])
    return series


def _experts(readings: Mapping[str, Sequence[Reading]], begin: float) -> dict[str, Any]:
    """`times`: edges of the spans between readings; `rows`: per expert, rows/s in each span. Empty: nobody counts."""
    for wanted in (EXPERT_ROWS, WORKER_ROWS):
        sources = [each for each in readings.values() if each and any(name == wanted for name, _ in each[0].values)]
        if not sources:
            continue
        # Endpoints are read together: their k-th readings are of one time. A killed one has fewer.
        length = max(map(len, sources))
        times = [reading.time - begin for reading in next(each for each in sources if len(each) == length)]
        rows: dict[str, list[float]] = {}
        for source in sources:
            for index, (before, after) in enumerate(itertools.pairwise(source)):
                for key, value in after.values.items():
                    if key[0] == wanted:
                        spans = rows.setdefault(_expert(key), [0.0] * (length - 1))
                        grown = max(0.0, value - before.values.get(key, 0.0))
                        spans[index] += grown / max(after.time - before.time, 1e-9)
        return {"times": times, "rows": dict(sorted(rows.items(), key=lambda item: int(item[0])))}
    return {}


def _expert(key: Key) -> str:
    return dict(key[1])["expert"]


def _shown(name: str, labels: tuple[tuple[str, str], ...]) -> str:
    return name + ("{" + ",".join(f'{label}="{value}"' for label, value in labels) + "}" if labels else "")
