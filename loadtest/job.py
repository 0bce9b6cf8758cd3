"""What a load process is given, and what it says on the way."""

from __future__ import annotations

import dataclasses
from typing import Any

from grokmoe import ClientOptions
from loadtest.planned import PlannedRequest


@dataclasses.dataclass(frozen=True)
class Job:
    """One process's share of a run.

    sampling: options of every request. concurrency: streams under way at most; None: no bound.
    """

    address: str
    client: ClientOptions
    sampling: dict[str, Any]
    request_id_prefix: str
    concurrency: int | None = None
    drain_seconds: float = 120.0


@dataclasses.dataclass(frozen=True)
class Go:
    """A plan to begin at `begin`, on the monotonic clock that all processes of the machine share.

    is_closed: send in turn, as clients become free, not by the plan's times.
    """

    begin: float
    plan: tuple[PlannedRequest, ...]
    is_closed: bool = False


@dataclasses.dataclass
class Counts:
    """How far a share is. `tokens` are those received."""

    sent: int = 0
    ended: int = 0
    failed: int = 0
    tokens: int = 0
    worst_lag: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.sent + other.sent,
            self.ended + other.ended,
            self.failed + other.failed,
            self.tokens + other.tokens,
            max(self.worst_lag, other.worst_lag),
        )
