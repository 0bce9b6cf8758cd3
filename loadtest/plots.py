"""The charts of a report, from a result and its records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from loadtest import latencies
from loadtest.chart import Mark, Points, Series, chart
from loadtest.heat_map import heat_map
from loadtest.metrics import concurrency, tokens_per_second
from loadtest.record import Outcome, RequestRecord
from loadtest.scale import Axis
from loadtest.window import Window

TIME = Axis("seconds of the run", is_tight=True, low=0.0)


def marks(result: dict[str, Any]) -> list[Mark]:
    """The measured window, and the faults."""
    begin, end = result["window"]
    faults = [Mark(each["at"], each["fault"]) for each in result.get("faults", ())]
    return [Mark(begin, f"measured window, {begin:.1f} to {end:.1f} s", end), *faults]


def over_time(result: dict[str, Any], records: Sequence[RequestRecord]) -> list[str]:
    """Latency of each request at the time it was due; tokens/s and requests under way."""
    charts = []
    for title, latency in (("TTFT", latencies.ttft), ("TPOT", latencies.tpot)):
        points = [(each.scheduled, value * 1e3) for each in records if (value := latency(each)) is not None]
        limit = result["slo"]["limits_ms"].get(title.lower())
        series = [Series("request", sorted(points), "dots")]
        # Only where it can be told from the data: a limit far away would press everything to the floor.
        if limit and points and limit < 20 * max(value for _, value in points):
            last = max((each.scheduled for each in records), default=1.0)
            series.append(Series(f"objective {limit:g} ms", [(0.0, limit), (last, limit)], "line", 1, True))
        charts.append(chart(f"{title} by when the request was due", TIME, Axis("ms", True), series, marks(result)))
    lost = [(each.scheduled, 1.0 + index) for index, each in enumerate(_failed(records))]
    charts.append(chart("failures so far", TIME, Axis("requests", low=0.0), [Series("", lost, "step", 1)]))
    last = max((each.end for each in records), default=0.0)
    step = max(0.5, last / 80)
    rates = tokens_per_second(records, Window(0.0, last), step)
    tokens = [((index + 0.5) * step, rate) for index, rate in enumerate(rates)]
    charts.append(
        chart("output tokens/s", TIME, Axis("tokens/s", low=0.0), [Series("", tokens, "line", 2)], marks(result))
    )
    levels = [(time, float(level)) for time, level in concurrency(records)]
    charts.append(
        chart("requests under way", TIME, Axis("requests", low=0.0), [Series("", levels, "step", 3)], marks(result))
    )
    return charts


def distributions(records: Sequence[RequestRecord], window: Window) -> list[str]:
    """Cumulative, of the requests of the window."""
    inside = [each for each in records if window.has(each.scheduled)]
    pairs = {
        "TTFT and end to end": {"TTFT": latencies.ttft, "end to end": latencies.e2el},
        "time per output token": {"TPOT": latencies.tpot},
    }
    charts = []
    for title, which in pairs.items():
        series = []
        for colour, (name, latency) in enumerate(which.items()):
            values = [value for each in inside if (value := latency(each)) is not None]
            series.append(Series(name, cumulative(values), "step", colour))
        if "TPOT" in which:
            gaps = [gap for each in inside for gap in latencies.itls(each)]
            series.append(Series("ITL", cumulative(gaps), "step", 2))
        charts.append(chart(f"distribution of {title}", Axis("ms", True), Axis("share", low=0.0, high=1.0), series))
    return charts


def cumulative(values: Sequence[float]) -> Points:
    """(milliseconds, share of the values up to it), at most at 400 shares."""
    if not values:
        return []
    ordered = sorted(values)
    num = min(len(ordered), 400)
    ranks = sorted({round((index + 1) * len(ordered) / num) for index in range(num)})
    return [(ordered[rank - 1] * 1e3, rank / len(ordered)) for rank in ranks]


def sweep(result: dict[str, Any]) -> list[str]:
    """Goodput and latency over the rate, and latency over the throughput that was reached."""
    steps = sorted(result.get("sweep", {}).get("steps", ()), key=lambda step: step["request_rate"])
    if not steps:
        return []
    done = [step for step in steps if "median_ttft_ms" in step]
    rates = [(step["request_rate"], step["request_goodput"]) for step in steps]
    completed = [(step["request_rate"], step["request_throughput"]) for step in steps]
    ideal = [(rate, rate) for rate, _ in rates]
    charts = [
        chart(
            "goodput over the rate offered",
            Axis("requests/s offered", low=0.0),
            Axis("requests/s", low=0.0),
            [
                Series("good", rates, "line", 2),
                Series("completed", completed, "line", 0),
                Series("all that was offered", ideal, "line", 3, True),
            ],
            [Mark(result["sweep"]["held"], "holds")] if result["sweep"]["held"] else [],
        )
    ]
    for name in ("ttft", "tpot"):
        series = [
            Series(
                label, sorted((step["output_throughput"], step[f"{key}_{name}_ms"]) for step in done), "line", colour
            )
            for colour, (label, key) in enumerate((("median", "median"), ("p99", "p99")))
            if all(f"{key}_{name}_ms" in step for step in done)
        ]
        axes = Axis("output tokens/s reached", low=0.0), Axis("ms", True)
        charts.append(chart(f"{name.upper()} over throughput", *axes, series))
    return charts


def server(result: dict[str, Any]) -> list[str]:
    """Rows per expert over time, and the gauges of the same run."""
    metrics = result.get("server_metrics") or {}
    charts = []
    if experts := metrics.get("experts"):
        charts.append(heat_map("rows per expert", experts["times"], experts["rows"], "seconds of the run", "expert"))
    series = metrics.get("series", {})
    requests = [
        Series(name.removeprefix("grokmoe_requests_"), [(t, v) for t, v in points], "step", colour)
        for colour, (name, points) in enumerate(series.items())
        if name.startswith("grokmoe_requests_")
    ]
    charts.append(chart("requests at the server", TIME, Axis("sequences", low=0.0), requests, marks(result)))
    pages = {name: points for name, points in series.items() if name.startswith("grokmoe_kv_pages")}
    names = labels_of(list(pages))
    lines = [
        Series(name, [(t, v) for t, v in points], "step", colour % 6)
        for colour, (name, points) in enumerate(zip(names, pages.values(), strict=True))
    ]
    charts.append(chart("KV pages", TIME, Axis("pages", low=0.0), lines[:6], marks(result)))
    return charts


def labels_of(names: Sequence[str]) -> list[str]:
    """`metric{state="used",worker="0"}` as `used`, with those labels only in which the names differ."""
    found = [dict(re.findall(r'(\w+)="([^"]*)"', name)) for name in names]
    telling = [label for label in (found[0] if found else {}) if len({each.get(label) for each in found}) > 1]
    return [
        ", ".join(_said(label, each.get(label, "")) for label in telling) or name
        for name, each in zip(names, found, strict=True)
    ]


def _said(label: str, value: str) -> str:
    """A number alone says nothing."""
    return f"{label} {value}" if value.isdigit() else value


def _failed(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    failed = [each for each in records if each.outcome in (Outcome.FAILED, Outcome.INCOMPLETE)]
    return sorted(failed, key=lambda each: each.scheduled)
