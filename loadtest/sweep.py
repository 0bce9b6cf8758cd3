"""The search for the highest rate that holds. Knows rates and verdicts, sends nothing.

        start             holds: rate x factor
    +-----------> CLIMB <------------------+
                    | fails                |
                    |     (nothing held yet: rate / factor)
                    v
                  BISECT between the highest rate that held and the lowest that failed, geometrically,
                    |    until they are within `tolerance`, or `max_steps` are done
                    v
                  DONE

A rate that held below one that failed is believed, and so is one that failed: the search does not repeat itself. A
single verdict near the edge is a matter of luck, so the answer is an interval: (held, failed).
"""

from __future__ import annotations

import dataclasses
import math

from grokmoe.errors import ConfigError


@dataclasses.dataclass
class Sweep:
    """start: the first rate, requests/s. factor: of the climb. tolerance: failed / held - 1 that is close enough.

    held: the highest rate that held below all that failed; 0: none did. failed: the lowest that failed; inf: none.
    """

    start: float
    factor: float = 2.0
    tolerance: float = 0.1
    max_steps: int = 12
    lowest: float = 0.01
    highest: float = math.inf
    held: float = 0.0
    failed: float = math.inf
    num_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.start < math.inf or self.factor <= 1 or self.tolerance <= 0 or self.max_steps < 1:
            raise ConfigError("a sweep needs a rate above 0, a factor above 1, a tolerance above 0 and steps")

    def next_rate(self) -> float | None:
        """What to try; None: it is over."""
        if self.num_steps >= self.max_steps or self._is_close():
            return None
        if not self.num_steps:
            return self.start
        if not self.held:
            rate = self.failed / self.factor
            return rate if rate >= self.lowest else None
        if math.isinf(self.failed):
            rate = min(self.held * self.factor, self.highest)
            return rate if rate > self.held else None
        return math.sqrt(self.held * self.failed)

    def add(self, rate: float, holds: bool) -> None:
        """The verdict on it."""
        self.num_steps += 1
        if holds:
            self.held = max(self.held, rate)
        else:
            self.failed = min(self.failed, rate)

    def _is_close(self) -> bool:
        return self.held > 0 and self.failed <= self.held * (1 + self.tolerance)


KEEPS_UP = 0.9
"""Share of the requests scheduled in the window that must complete in its length: below it a queue is growing, and
the objectives only hold until it is long enough."""


def holds(figures: dict[str, float]) -> bool:
    """Whether a rate holds, from what `loadtest.metrics.measure` says of it."""
    keeps_up = figures["request_throughput"] * figures["duration"] >= KEEPS_UP * figures["scheduled"]
    return bool(figures["slo_holds"]) and keeps_up
