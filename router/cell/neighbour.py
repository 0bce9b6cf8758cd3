"""Another worker, as a cell sees it."""

from __future__ import annotations

from typing import Protocol

from router.step_times import StepTimes


class Neighbour(Protocol):
    """One that is in use, and is here to stay."""

    @property
    def room(self) -> int:
        """Sequences more that would take part in its steps at once."""

    @property
    def is_slow(self) -> bool:
        """Whether it is to be avoided where there is a better one."""

    @property
    def times(self) -> StepTimes:
        """What its answers took."""
