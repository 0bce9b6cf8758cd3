"""What has happened to expert calls since start."""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter


class Cause(enum.StrEnum):
    """Why rows were sent again.

    LOST: connection or worker gone. DEADLINE: no answer in time. CORRUPT: an answer that cannot be. INTERNAL: the
    worker says that it failed. DRAINING: it refused, being about to end.
    """

    LOST = "lost"
    DEADLINE = "deadline"
    CORRUPT = "corrupt"
    INTERNAL = "internal"
    DRAINING = "draining"
    NOT_HELD = "not_held"


@dataclasses.dataclass
class ExpertCounters:
    """Sums since start.

    calls: messages of rows sent, retries and hedges included. retries: of these, sent again, by cause. failovers:
    workers taken out of use. hedges_won, hedges_lost: second calls whose answer came first, or did not; `hedges` is
    all that were begun. corrupt: answers that cannot be.
    """

    calls: int = 0
    failovers: int = 0
    hedges: int = 0
    hedges_won: int = 0
    hedges_lost: int = 0
    corrupt: int = 0
    retries: Counter[Cause] = dataclasses.field(default_factory=Counter)

    @property
    def deadline_misses(self) -> int:
        """Calls given up because no answer came in time."""
        return self.retries[Cause.DEADLINE]
