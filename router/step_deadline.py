"""How long an attention worker may take for its part of a layer before it counts as hung. Pure.

A false alarm costs the computation of all its sequences, and the worker that takes them over would raise the next one,
so the rule is generous: a multiple of what nine of ten answers are below, never below a floor. It is used only where
another worker could take over; one that is alone is waited for.

What false alarms there are do not change the limit: a worker that hung once must not be allowed seconds for the rest
of its life. A worker that raised one is avoided for a while (router/step_pace.py), and when there is no better one, all
are given more time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from router.step_times import StepTimes


@dataclasses.dataclass(frozen=True)
class StepDeadlineSettings:
    """Named limits."""

    factor: float = 8.0
    """Times what nine of ten answers are below."""
    floor: float = 0.4
    """Seconds. A busy machine of few cores pauses a process for some tenths of a second."""
    first_floor: float = 2.0
    """Seconds; the floor of a worker of which nothing is known: a process is slow at its first step."""
    ceiling: float = 60.0
    """Seconds; also the limit before anything is known of any worker."""
    peer_factor: float = 2.0
    """What another worker takes, times this, is expected of a class that this worker has not been seen at."""
    leniency: float = 8.0
    """Times the limit, where every other worker is slow too: then it is the work, or the machine, and who is given up
    now would be missed in a moment."""


class StepDeadline:
    """One worker's: learns from what it took, says what it may take."""

    def __init__(self, settings: StepDeadlineSettings | None = None) -> None:
        self._settings = settings or StepDeadlineSettings()
        self.times = StepTimes()

    def observe(self, work: int, seconds: float) -> None:
        """The worker took `seconds` for one layer of so much work."""
        self.times.add(work, seconds)

    def allowance(self, work: int, peers: Iterable[StepTimes] = (), is_lenient: bool = False) -> float:
        """Seconds that the worker may take for one layer of so much work. peers: what other workers took."""
        limits = self._settings
        own = self.times.long(work)
        theirs = min((long for peer in peers if (long := peer.long(work)) is not None), default=None)
        if own is None and theirs is None:
            return limits.ceiling
        bounds = [] if own is None else [own]
        if theirs is not None and not self.times.is_known(work):
            bounds.append(limits.peer_factor * theirs)
        floor = limits.first_floor if own is None else limits.floor
        limit = max(limits.factor * min(bounds), floor)
        return min(limit * limits.leniency if is_lenient else limit, limits.ceiling)
