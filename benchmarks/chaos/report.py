"""The tables."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from benchmarks.chaos.campaign import UNDISTURBED, Effect
from benchmarks.chaos.resources import Holding


@dataclasses.dataclass(frozen=True)
class Row:
    """The effects of one kind on one role together. Seconds; a request that met two faults counts for both."""

    kind: str
    target: str
    faults: int
    requests: int
    lost: int
    changed: int
    stall_median: float
    stall_max: float
    first_median: float
    first_max: float
    back_median: float | None
    back_max: float | None
    not_back: int


def rows(effects: Iterable[Effect]) -> list[Row]:
    """One per kind and role, in the order of their first effect."""
    groups: dict[tuple[str, str], list[Effect]] = collections.defaultdict(list)
    for effect in effects:
        groups[effect.kind, effect.target].append(effect)
    return [_row(kind, target, group) for (kind, target), group in groups.items()]


def _row(kind: str, target: str, group: Sequence[Effect]) -> Row:
    stalls, firsts = [each.stall for each in group], [each.first_wait for each in group]
    backs = [each.back for each in group if each.back is not None]
    return Row(
        kind,
        target,
        len(group),
        sum(each.num_requests for each in group),
        sum(each.num_lost for each in group),
        sum(each.num_changed for each in group),
        statistics.median(stalls),
        max(stalls),
        statistics.median(firsts),
        max(firsts),
        statistics.median(backs) if backs else None,
        max(backs, default=None),
        0 if kind == UNDISTURBED else len(group) - len(backs),
    )


HEADER = (
    "kind",
    "target",
    "faults",
    "requests",
    "lost",
    "changed",
    "longest stall",
    "first token",
    "in use again",
)
"""The last three are in seconds, median / largest."""


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of HEADER."""
    back = _pair(row.back_median, row.back_max) + (f" ({row.not_back} never)" if row.not_back else "")
    counts = map(str, (row.faults, row.requests, row.lost, row.changed))
    return (
        row.kind,
        row.target,
        *counts,
        _pair(row.stall_median, row.stall_max),
        _pair(row.first_median, row.first_max),
        back,
    )


def table(all_rows: Iterable[Row]) -> Table:
    """For people."""
    made = Table(title="seconds: median / largest", title_justify="left", box=None, padding=(0, 2))
    for name in HEADER:
        made.add_column(name, justify="left" if name in ("kind", "target") else "right")
    for row in all_rows:
        made.add_row(*cells(row))
    return made


def markdown(all_rows: Iterable[Row]) -> str:
    """For docs/reliability.md."""
    lines = (HEADER, ("---",) * len(HEADER), *map(cells, all_rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _pair(median: float | None, largest: float | None) -> str:
    return "-" if median is None or largest is None else f"{median:.2f} / {largest:.2f}"


def errors(effects: Iterable[Effect]) -> collections.Counter[str]:
    """What the lost requests were told, and how often; with the fault they met."""
    return collections.Counter(f"{each.kind} {each.target}: {error}" for each in effects for error in each.errors)


def holdings_table(before: Sequence[Holding], after: Sequence[Holding]) -> Table:
    """What each process held at the beginning and at the end."""
    made = Table(title="begin -> end", title_justify="left", box=None, padding=(0, 2))
    for name in ("process", "starts", "RSS MiB", "descriptors", "threads"):
        made.add_column(name, justify="left" if name == "process" else "right")
    for old, new in zip(before, after, strict=True):
        pairs: list[tuple[Any, Any]] = [
            (f"{old.rss:.0f}", f"{new.rss:.0f}"),
            (old.descriptors, new.descriptors),
            (old.threads, new.threads),
        ]
        made.add_row(old.name, str(new.num_starts), *(f"{one} -> {two}" for one, two in pairs))
    return made
