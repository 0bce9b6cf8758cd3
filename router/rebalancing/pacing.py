"""When an automatic rebalance moves: not on the first sign, not again right after. Pure; the caller has the clock.

WATCHING --worth it, `patience` times in a row--> MOVE --> RESTING --cooldown over--> WATCHING
   ^  |
   +--+ not worth it: the count begins anew
"""

from __future__ import annotations

from router.rebalancing.settings import RebalanceSettings


class Pacing:
    """Asked at every interval; says when to move."""

    def __init__(self, settings: RebalanceSettings) -> None:
        self._settings = settings
        self._in_a_row = 0
        self._resting_until = float("-inf")

    def is_resting(self, now: float) -> bool:
        """Whether the last moves are too recent to plan again. now: seconds."""
        return now < self._resting_until

    def should_move(self, now: float, is_worth_it: bool) -> bool:
        """Takes the verdict of one plan."""
        if self.is_resting(now):
            return False
        self._in_a_row = self._in_a_row + 1 if is_worth_it else 0
        return self._in_a_row >= self._settings.patience

    def moved(self, now: float) -> None:
        """Moves were made, by whomever, or have failed."""
        self._in_a_row = 0
        self._resting_until = now + self._settings.cooldown
