"""How long calls to one worker take, by number of rows, and how long the next one may take. Pure."""

from __future__ import annotations

import bisect
import math
from collections import deque

from router.experts.settings import ExpertPoolSettings

WINDOW = 256
"""Calls of one class that are remembered. The 0.99 quantile of it is its third largest: one outlier sets no deadline,
and a change of load is learnt within a few steps."""

MIN_SAMPLES = 16
"""Calls of a class before its quantile is believed: the steps of a tenth of a second, in a model of any depth."""


class Window:
    """The last WINDOW samples, in order of arrival and of size."""

    def __init__(self) -> None:
        self._arrived: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, seconds: float) -> None:
        """Takes a sample; the oldest leaves when the window is full."""
        if len(self._arrived) == WINDOW:
            del self._sorted[bisect.bisect_left(self._sorted, self._arrived.popleft())]
        self._arrived.append(seconds)
        bisect.insort(self._sorted, seconds)

    def quantile(self, share: float) -> float:
        """The smallest sample that at least `share` of the samples do not exceed."""
        return self._sorted[max(0, math.ceil(share * len(self._sorted)) - 1)]


class Latency:
    """Windows by class of rows: class c has 2^(c-1) to 2^c - 1 rows. Decodes and prefills take different times, so a
    quantile over both would be that of neither.
    """

    def __init__(self) -> None:
        self._windows: dict[int, Window] = {}

    def add(self, num_rows: int, seconds: float) -> None:
        """Takes the time of one call, or of one that was given up: it would have taken at least as long."""
        self._windows.setdefault(num_rows.bit_length(), Window()).add(seconds)

    def quantile(self, num_rows: int, share: float) -> float | None:
        """Of calls of about so many rows. None until MIN_SAMPLES calls have been observed.

        A class without enough calls takes the nearest smaller one's times the ratio of rows, as if every row cost
        the same, or else the nearest larger one's as it is; and while no class has enough, the most that any makes
        of what it has. All three guess high.
        """
        wanted = num_rows.bit_length()
        known = [each for each, window in self._windows.items() if len(window) >= MIN_SAMPLES]
        smaller, larger = [each for each in known if each <= wanted], [each for each in known if each > wanted]
        if smaller or larger:
            return self._scaled(max(smaller) if smaller else min(larger), wanted, share)
        if sum(map(len, self._windows.values())) < MIN_SAMPLES:
            return None
        return max(self._scaled(each, wanted, share) for each in self._windows)

    def _scaled(self, known: int, wanted: int, share: float) -> float:
        return self._windows[known].quantile(share) * 2.0 ** max(0, wanted - known)


def call_deadline(latency: Latency, num_rows: int, num_attempts: int, settings: ExpertPoolSettings) -> float:
    """Seconds after which a call is sent elsewhere, if there is an elsewhere.

    num_rows: those of the call and those the worker has before it.
    num_attempts: how often the same rows have been sent already. Each doubles the deadline, so that rows which are
    slow everywhere are computed at last and not passed round.
    """
    observed = latency.quantile(num_rows, settings.deadline_quantile)
    base = settings.deadline_cold if observed is None else settings.deadline_factor * observed
    return min(max(base, settings.deadline_floor) * 2.0 ** min(num_attempts, 60), settings.deadline_ceiling)
