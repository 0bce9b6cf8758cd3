"""What has been counted lately, per second; and what a row costs on one worker relative to the others.

Letters: W workers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

SAME_KIND = 1.25
"""Workers whose rows cost up to this much more or less than usual count as equal: timings on shared machines differ
by that, and a plan that believed them would move experts for noise."""


class Rate:
    """A mean of counts per second in which the past fades with a time constant.

    Takes totals since start, so whoever counts pays for counting only; a total that falls is another counter, which
    begins at nought.
    """

    def __init__(self, window: float) -> None:
        """window: the time constant, seconds."""
        self._window = window
        self.restart()

    def restart(self) -> None:
        """Forgets what has been seen."""
        self._totals: Array | None = None
        self._at = 0.0
        self._sum: Array | None = None
        self._weight = 0.0

    def observe(self, now: float, totals: Array) -> None:
        """Takes the totals at a time. Counts since the last look are taken as spread evenly over the time between."""
        if self._totals is None or now <= self._at or (totals < self._totals).any():
            if self._totals is None or now > self._at:
                self._totals, self._at = totals.copy(), now
            return
        seconds = now - self._at
        kept = math.exp(-seconds / self._window)
        gained = self._window * (1 - kept)
        news = (totals - self._totals) / seconds * gained
        self._sum = news if self._sum is None else self._sum * kept + news
        self._weight = self._weight * kept + gained
        self._totals, self._at = totals.copy(), now

    @property
    def num_seen(self) -> float:
        """Counts that the mean rests on."""
        return 0.0 if self._sum is None else float(self._sum.sum())

    def per_second(self) -> Array | None:
        """The mean, of the counter's shape. None: not looked at twice yet."""
        return None if self._sum is None else self._sum / self._weight


def relative_costs(computed: Sequence[Mapping[int, tuple[float, float]]]) -> list[float]:
    """What a row costs on each worker, over what it would cost if all were alike; 1.0 where nothing is known.

    computed: per worker, by class of rows, rows and seconds. A worker is compared with the mean of its own classes:
    few rows in a call cost more each, and who gets few must not look slow for it.
    """
    rows: dict[int, float] = {}
    seconds: dict[int, float] = {}
    for worker in computed:
        for each, (count, spent) in worker.items():
            rows[each] = rows.get(each, 0.0) + count
            seconds[each] = seconds.get(each, 0.0) + spent
    costs = []
    for worker in computed:
        usual = sum(count * seconds[each] / rows[each] for each, (count, _) in worker.items() if rows[each])
        cost = sum(spent for _, spent in worker.values()) / usual if usual > 0 else 1.0
        costs.append(1.0 if 1 / SAME_KIND <= cost <= SAME_KIND else cost)
    return costs
