"""What was measured, and what follows from it: medians, spreads, ratios. Pure."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable

from benchmarks.peers.workload import Metric


@dataclasses.dataclass(frozen=True)
class Sample:
    """The value of one metric of one contender in one round.

    foreign: share of the machine that processes outside the race used meanwhile, 0 to 1.
    """

    round: int
    row: str
    metric: str
    value: float
    foreign: float = 0.0


class Results:
    """All samples of a race. Of two samples of the same round the later one counts."""

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self.samples = list(samples)

    def add(self, samples: Iterable[Sample]) -> None:
        """Takes more."""
        self.samples.extend(samples)

    def rows(self) -> list[str]:
        """The contenders that have a value, in the order of their first."""
        return list(dict.fromkeys(sample.row for sample in self.samples))

    def values(self, row: str, metric: Metric) -> dict[int, float]:
        """Round -> value."""
        mine = (each for each in self.samples if each.row == row and each.metric == metric.name)
        return {each.round: each.value for each in mine}

    def median(self, row: str, metric: Metric) -> float | None:
        """Of all rounds; None without a value."""
        values = self.values(row, metric).values()
        return statistics.median(values) if values else None

    def spread(self, row: str, metric: Metric) -> float | None:
        """Half the distance of the smallest and the largest value, over the median; None with fewer than two."""
        values = self.values(row, metric).values()
        if len(values) < 2:
            return None
        return (max(values) - min(values)) / 2 / statistics.median(values)

    def best(self, rows: Iterable[str], metric: Metric) -> str | None:
        """The row with the best median; None if none has a value."""
        medians = {row: median for row in rows if (median := self.median(row, metric)) is not None}
        if not medians:
            return None
        return (max if metric.more_is_better else min)(medians, key=medians.__getitem__)

    def ratios(self, row: str, other: str, metric: Metric) -> list[float]:
        """row / other in each round that has both: rounds are minutes apart, and the machine is another one then."""
        mine, theirs = self.values(row, metric), self.values(other, metric)
        return [mine[number] / theirs[number] for number in sorted(mine.keys() & theirs.keys())]

    def foreign(self) -> list[float]:
        """What others used during each contender's turn."""
        return list({(each.round, each.row): each.foreign for each in self.samples}.values())
