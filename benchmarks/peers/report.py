"""The tables: what was measured, and which goals are met."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from rich.table import Table

from benchmarks.peers.goals import FUSED, PEERS, Verdict
from benchmarks.peers.results import Results
from benchmarks.peers.workload import Metric

RATIO = "grokmoe / best peer"


def number(value: float) -> str:
    """Three digits that matter, no fewer than the whole ones."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def cell(results: Results, row: str, metric: Metric) -> str:
    """Median and spread, such as `431 ±4 %`."""
    median, spread = results.median(row, metric), results.spread(row, metric)
    if median is None:
        return "-"
    return number(median) + ("" if spread is None else f" ±{100 * spread:.0f} %")


def ratio(results: Results, metric: Metric) -> str:
    """Of the fused service to the best peer, smallest and largest round, such as `2.41 (2.30-2.52) vLLM`."""
    best = results.best(PEERS, metric)
    if best is None or results.median(FUSED, metric) is None:
        return "-"
    ratios = results.ratios(FUSED, best, metric)
    if not ratios:
        return "-"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) {best}"


def lines(results: Results, metrics: Iterable[Metric]) -> list[tuple[str, ...]]:
    """A header and a line per metric that somebody has a value of; a column per contender, and the ratio."""
    rows = results.rows()
    found = [("median of rounds", *rows, RATIO)]
    for metric in metrics:
        cells = [cell(results, row, metric) for row in rows]
        if any(each != "-" for each in cells):
            found.append((f"{metric.name}, {metric.unit}", *cells, ratio(results, metric)))
    return found


def goal_lines(verdicts: Iterable[Verdict]) -> list[tuple[str, ...]]:
    """A header and a line per goal."""
    found: list[tuple[str, ...]] = [("goal", "of", "bound", "reached", "met")]
    for verdict in verdicts:
        goal = verdict.goal
        sign = "at least" if goal.metric.more_is_better else "at most"
        unit = f" x {verdict.other or ' or '.join(goal.others)}" if goal.others else f" {goal.metric.unit}"
        reached = "not measured"
        if verdict.value is not None:
            reached = f"{number(verdict.value)} ({number(verdict.low)}-{number(verdict.high)})"
        met = {True: "yes", False: "no", None: "-"}[verdict.is_met]
        found.append((goal.metric.name, goal.row, f"{sign} {number(goal.bound)}{unit}", reached, met))
    return found


def table(all_lines: Sequence[tuple[str, ...]]) -> Table:
    """For people. all_lines: the header first."""
    header, *rest = all_lines
    made = Table(box=None, padding=(0, 2))
    for index, name in enumerate(header):
        made.add_column(name, justify="right" if index else "left")
    for line in rest:
        made.add_row(*line)
    return made


def markdown(all_lines: Sequence[tuple[str, ...]]) -> str:
    """For a page of docs/."""
    header, *rest = all_lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ("---",) * len(header), *rest))
