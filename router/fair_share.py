"""Who goes first: start-time fair queueing over callers, with a bounded head start for priority.

A request's place is a number, fixed when it arrives. Every caller has a virtual clock that advances by what its
requests cost; a request starts where its caller's clock stands, but not before the service's own, which stands where
the latest admitted request started. So a caller that sends a thousand requests queues behind itself, and one that sends
a single request goes between them. A level of priority moves the place ahead by a fixed cost: it is a head start, not a
right of way, so nobody waits for ever.

Source: Goyal, Vin, Cheng, "Start-time Fair Queuing", SIGCOMM 1996; weights are equal here.
"""

from __future__ import annotations

import dataclasses

MIN_PRIORITY, MAX_PRIORITY = -2, 2

MAX_IDLE_CALLERS = 4096
"""Clocks kept of callers; beyond it those that lag behind the service's are forgotten, which changes nothing."""


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class Place:
    """A place in the queue: the lower, the sooner. `number` is unique, so places never tie."""

    start: float
    number: int


class FairShare:
    """Gives out places."""

    def __init__(self, priority_cost: float = 16384.0) -> None:
        """priority_cost: tokens of work that one level of priority moves a request ahead."""
        self._priority_cost = priority_cost
        self._now = 0.0
        self._clocks: dict[str, float] = {}
        self._next_number = 0

    def place(self, caller: str, cost: float, priority: int = 0, count: int = 1) -> list[Place]:
        """Places for `count` sequences of one request; `cost` is that of each, in tokens."""
        start = max(self._now, self._clocks.get(caller, 0.0))
        places = []
        for _ in range(count):
            places.append(Place(start - priority * self._priority_cost, self._next_number))
            self._next_number += 1
        # The candidates of a request stand together: they share its pages.
        self._clocks[caller] = start + cost * count
        if len(self._clocks) > MAX_IDLE_CALLERS:
            self._clocks = {name: clock for name, clock in self._clocks.items() if clock > self._now}
        return places

    def admitted(self, place: Place, priority: int = 0) -> None:
        """A request has begun: nobody who comes now starts before it did."""
        self._now = max(self._now, place.start + priority * self._priority_cost)
