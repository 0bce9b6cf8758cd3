"""Simulated time: what happens next, and when."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

Call = Callable[[], None]


class Clock:
    """Events in the order of their times; of equal times the one that was asked for first.

    now: seconds. num_events: that have happened.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Call]] = []

    def at(self, time: float, call: Call) -> None:
        """Calls when the time has come; at once if it is over."""
        heapq.heappush(self._events, (max(time, self.now), next(self._numbers), call))

    def after(self, seconds: float, call: Call) -> None:
        """Calls so many seconds from now."""
        self.at(self.now + seconds, call)

    def run(self, until: float, is_over: Callable[[], bool] = lambda: False) -> None:
        """Until nothing is left to happen, or not before a time, or until it is over."""
        while self._events and self._events[0][0] <= until and not is_over():
            self.now, _, call = heapq.heappop(self._events)
            self.num_events += 1
            call()


class Server:
    """Something that does one thing after another, in the order in which they were asked for.

    busy: seconds that it was or will be busy with what it was asked for.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._free_at = 0.0
        self.busy = 0.0

    def serve(self, seconds: float, call: Call) -> None:
        """Calls when it has come to this and has done it."""
        self._free_at = max(self._free_at, self._clock.now) + seconds
        self.busy += seconds
        self._clock.at(self._free_at, call)

    def forget(self) -> None:
        """What it was asked for will not be done: it starts anew."""
        self.busy -= max(0.0, self._free_at - self._clock.now)
        self._free_at = self._clock.now
