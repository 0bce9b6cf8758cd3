"""Two results side by side: what changed, how sure that is, and whether it got worse."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from loadtest import statistics
from loadtest.metrics import Selected, select, tokens_per_second
from loadtest.record import RequestRecord
from loadtest.slo import Slo
from loadtest.statistics import Interval, Statistic
from loadtest.tables import NAMES, Table, milliseconds
from loadtest.window import Window

LATENCIES = ("ttft", "tpot", "e2el", "ntpot")
"""Those with one value per request: gaps of one request are no independent draws."""

THRESHOLD = 0.05
"""A change below this share is nobody's regression, however sure."""

FEWEST_SPANS = 5
"""Seconds of a window below which its throughput has no spread to judge by."""


@dataclasses.dataclass(frozen=True)
class Change:
    """One figure, before and after. interval: of after - before. higher_is_better: of throughput and goodput."""

    name: str
    before: float
    after: float
    interval: Interval | None
    higher_is_better: bool = False
    unit: str = "ms"

    @property
    def share(self) -> float:
        """Of the figure before; 0 where there was nothing."""
        return (self.after - self.before) / self.before if self.before else 0.0

    def worse_by(self) -> float:
        """The share, above 0 if it got worse."""
        return -self.share if self.higher_is_better else self.share

    def is_sure(self) -> bool:
        """Whether the interval leaves no change out."""
        return self.interval is not None and (self.interval.low > 0 or self.interval.high < 0)

    def is_regression(self, threshold: float) -> bool:
        """Worse by more than the threshold, with confidence."""
        return self.is_sure() and self.worse_by() > threshold


Side = tuple[dict[str, Any], Sequence[RequestRecord]]
"""A result and its records."""


def compare(before: Side, after: Side, seed: int = 0) -> list[Change]:
    """The changes of what both have."""
    chosen = [_selected(side) for side in (before, after)]
    changes = []
    for name in LATENCIES:
        for label, statistic in (
            ("mean", statistics.mean),
            ("median", statistics.percentile(50)),
            ("p99", statistics.percentile(99)),
        ):
            values = [np.asarray(each.values(name)) * 1e3 for each in chosen]
            if all(map(len, values)):
                changes.append(_change(f"{NAMES[name]} {label}", values, statistic, seed))
    sides = zip((before, after), chosen, strict=True)
    tokens = [np.asarray(tokens_per_second(records, each.window)) for (_, records), each in sides]
    if min(map(len, tokens)) >= FEWEST_SPANS:
        changes.append(_change("output tokens/s", tokens, statistics.mean, seed, True, "tokens/s"))
    changes.append(_goodness(before, after, seed))
    return changes


def _selected(side: Side) -> Selected:
    result, records = side
    return select(records, Window.of(result))


def _change(
    name: str,
    values: Sequence[Any],
    statistic: Statistic,
    seed: int,
    higher_is_better: bool = False,
    unit: str = "ms",
) -> Change:
    before, after = (float(statistic(each[None, :])[0]) for each in values)
    interval = statistics.difference(values[0], values[1], statistic, seed)
    return Change(name, before, after, interval, higher_is_better, unit)


def _goodness(before: Side, after: Side, seed: int) -> Change:
    """Share of good requests, by the first one's objectives."""
    slo = before[0]["slo"]
    judge = Slo(tuple((name, limit / 1e3) for name, limit in slo["limits_ms"].items()), slo["share"])
    goods = [np.asarray([float(judge.is_good(each)) for each in _selected(side).records]) for side in (before, after)]
    values = [each if len(each) else np.zeros(1) for each in goods]
    return _change("good requests", values, statistics.mean, seed, True, "share")


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Settings and model that were not the same, without which the comparison may mean nothing."""
    skipped = {"output_dir", "label", "metadata", "progress", "request_id_prefix", "metrics_url", "state"}
    names = [name for name in before["settings"] if name not in skipped]
    found = [
        f"{name}: {before['settings'][name]} -> {after['settings'].get(name)}"
        for name in names
        if before["settings"][name] != after["settings"].get(name)
    ]
    if "sweep" in before and "sweep" in after and before["request_rate"] != after["request_rate"]:
        found.append(f"rate that held: {before['request_rate']:.3g} -> {after['request_rate']:.3g} requests/s")
    if before["server"]["config_hash"] != after["server"]["config_hash"]:
        found.append("the models are not the same")
    for which, each in (("A", before), ("B", after)):
        if not each["valid"]:
            found.append(f"{which} is invalid: {each['invalid_because']}")
    return found


def change_table(changes: Sequence[Change], threshold: float) -> Table:
    """For the terminal and for Markdown."""
    rows = []
    for each in changes:
        interval = "-"
        if each.interval is not None:
            interval = f"{milliseconds(each.interval.low)} to {milliseconds(each.interval.high)}"
        if each.is_regression(threshold):
            verdict = "WORSE"
        elif each.is_sure() and each.worse_by() < -threshold:
            verdict = "better"
        else:
            verdict = "same" if each.interval is not None else "unsure"
        name = f"{each.name}, {each.unit}"
        values = milliseconds(each.before), milliseconds(each.after)
        rows.append((name, *values, f"{100 * each.share:+.1f} %", interval, verdict))
    return Table("B against A", ("", "A", "B", "change", "B - A, 95 %", ""), tuple(rows))
