"""What both tools say of a request, and whether they say the same. Pure.

A latency is counted from the actual send by both. The first token is the first message with one, the last token the
last such message; TPOT is the time between them over the tokens after the first message. AIPerf counts tokens by
cutting the answer's text up again, unless it is told to take the server's count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loadtest.record import Outcome, RequestRecord
from loadtest.statistics import Interval, Statistic, between, mean, percentile, resample

LATENCIES = ("TTFT", "TPOT", "end to end")

STATISTICS: dict[str, Statistic] = {"mean": mean, "median": percentile(50), "p90": percentile(90)}

Latencies = Mapping[str, Sequence[float]]
"""Milliseconds of each request, by name."""


def of_ours(records: Sequence[RequestRecord]) -> Latencies:
    """Of `grokmoe loadtest`."""
    done = [each for each in records if each.outcome is Outcome.COMPLETED]
    return of_stamps([(each.sent, each.arrivals, each.counts) for each in done])


def of_stamps(requests: Sequence[tuple[float, Sequence[float], Sequence[int]]]) -> Latencies:
    """Of (when it was sent, when each message with tokens came, how many it had), seconds."""
    return {
        "TTFT": [(stamps[0] - sent) * 1e3 for sent, stamps, _ in requests],
        "TPOT": [(stamps[-1] - stamps[0]) * 1e3 / sum(counts[1:]) for _, stamps, counts in requests if sum(counts[1:])],
        "end to end": [(stamps[-1] - sent) * 1e3 for sent, stamps, _ in requests],
    }


AIPERF_NAMES = {"TTFT": "time_to_first_token", "TPOT": "inter_token_latency", "end to end": "request_latency"}


def of_aiperf(records: Sequence[Mapping[str, Any]], begin: float, end: float) -> Latencies:
    """Of the lines of its profile_export.jsonl: requests that it sent between two times, seconds of the epoch."""
    inside = [each["metrics"] for each in records if begin <= each["metadata"]["request_start_ns"] / 1e9 <= end]
    return {name: [float(each[key]["value"]) for each in inside if key in each] for name, key in AIPERF_NAMES.items()}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One figure, milliseconds. hop: what the gateway adds. left: theirs - ours - hop; interval: of it, 95 %."""

    name: str
    ours: float
    theirs: float
    hop: float
    left: float
    interval: Interval

    @property
    def agrees(self) -> bool:
        """Whether the interval leaves room for no difference."""
        return self.interval.low <= 0 <= self.interval.high


def compare(
    ours: Latencies, theirs: Latencies, around: Latencies, through: Latencies, seed: int = 0
) -> list[Comparison]:
    """around, through: single requests past the gateway and through it, in turn, under the same load."""
    found = []
    for latency in LATENCIES:
        for label, statistic in STATISTICS.items():
            sides = [np.asarray(each[latency]) for each in (ours, theirs, around, through)]
            values = [float(statistic(side)) for side in sides]
            draws = [resample(side, statistic, 4 * seed + index) for index, side in enumerate(sides)]
            num = min(map(len, draws))
            left = _left([each[:num] for each in draws])
            found.append(
                Comparison(
                    f"{latency}, {label}", values[0], values[1], values[3] - values[2], _left(values), between(left)
                )
            )
    return found


def _left(sides: Sequence[Any]) -> Any:
    ours, theirs, around, through = sides
    return theirs - ours - (through - around)
