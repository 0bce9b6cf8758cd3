"""The part of a run that is measured: after the load has built up, before it runs out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from grokmoe.errors import ConfigError
from loadtest.record import RequestRecord


@dataclasses.dataclass(frozen=True)
class Window:
    """From `begin` to `end`, seconds of the run. is_whole: nothing was cut off."""

    begin: float
    end: float
    is_whole: bool = False

    @property
    def seconds(self) -> float:
        """Its length."""
        return max(self.end - self.begin, 1e-9)

    @classmethod
    def of(cls, result: dict[str, Any]) -> Window:
        """The one that a result was measured in."""
        begin, end = result["window"]
        return cls(begin, end, result["window"] == result["whole_run"]["window"])

    def has(self, time: float) -> bool:
        """The begin belongs to it; so does the end of a whole run, where its last event is."""
        return self.begin <= time < self.end or (self.is_whole and time == self.end)


def whole(records: Sequence[RequestRecord]) -> Window:
    """From the start of the run to the end of the last request."""
    return Window(0.0, max((record.end for record in records), default=0.0), True)


def steady(records: Sequence[RequestRecord], begin: float, end: float) -> Window:
    """From the share `begin` to the share `end` of the schedule. (0, 1) is the whole run, its draining included."""
    if not 0 <= begin < end <= 1:
        raise ConfigError(f"window is {begin},{end}: two ascending shares of the run, from 0 to 1")
    if (begin, end) == (0.0, 1.0):
        return whole(records)
    last = max((record.scheduled for record in records), default=0.0)
    return Window(begin * last, end * last)
