"""How long an attention worker may take for its part of a layer before it counts as hung. Pure.

A false alarm costs the computation of all its sequences, and the worker that takes them over would raise the next one,
so the rule is generous: a multiple of nearly the longest time seen for as much work, never below a floor. It is used
only where another worker could take over; one that is alone is waited for.
"""

from __future__ import annotations

import collections
import dataclasses
import math

from router.step import Step

POSITION_WORK = 1024
"""What the linear layers of one token cost, in positions that attention looks at. Between small models and Grok-1 it
is right within a factor of ten, which is enough to tell a decode from a long prefill."""


def work_of(step: Step) -> int:
    """A measure of what a step costs an attention worker per layer."""
    return sum(len(chunk.token_ids) * (POSITION_WORK + chunk.end) for chunk in step.chunks)


@dataclasses.dataclass(frozen=True)
class StepDeadlineSettings:
    """Named limits."""

    quantile: float = 0.99
    """Of the times seen lately."""
    factor: float = 8.0
    """Times this."""
    floor: float = 0.4
    """Seconds. A busy machine of few cores pauses a process for some tenths of a second."""
    ceiling: float = 60.0
    """Seconds; also the limit before anything is known."""
    window: int = 256
    """Times remembered per class of work: a few steps of a deep model, and few enough to forget a bad day."""
    min_samples: int = 16
    """Times to know before a class counts."""
    max_leniency: float = 16.0
    """Each false alarm doubles the limit, up to this many times."""


class _Window:
    """The last times of one class of work, and their quantile, which is found anew every `min_samples` times."""

    def __init__(self, settings: StepDeadlineSettings) -> None:
        self._settings = settings
        self._seconds: collections.deque[float] = collections.deque(maxlen=settings.window)
        self._num_since = 0
        self.quantile: float | None = None

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)
        self._num_since += 1
        if self._num_since >= self._settings.min_samples:
            self._num_since = 0
            ordered = sorted(self._seconds)
            self.quantile = ordered[min(len(ordered) - 1, math.floor(self._settings.quantile * len(ordered)))]


class StepDeadline:
    """One worker's: learns from what it took, says what it may take. Work is classed by powers of two."""

    def __init__(self, settings: StepDeadlineSettings | None = None) -> None:
        self._settings = settings or StepDeadlineSettings()
        self._windows: dict[int, _Window] = {}
        self._leniency = 1.0

    def observe(self, work: int, seconds: float) -> None:
        """The worker took `seconds` for one layer of so much work."""
        window = self._windows.get(work.bit_length())
        if window is None:
            window = self._windows[work.bit_length()] = _Window(self._settings)
        window.add(seconds)

    def allowance(self, work: int) -> float:
        """Seconds that the worker may take for one layer of so much work."""
        limits = self._settings
        usual = self._usual(work.bit_length())
        if usual is None:
            return limits.ceiling
        return min(max(limits.factor * self._leniency * usual, limits.floor), limits.ceiling)

    def forgive(self) -> None:
        """It was a false alarm: the worker has not hung, it was slow."""
        self._leniency = min(2 * self._leniency, self._settings.max_leniency)

    def _usual(self, size: int) -> float | None:
        """Nearly the longest time seen for work of a class; None: unknown. What is smaller is scaled up, since time
        grows at most as the work does; what is larger is taken as it is."""
        own = self._windows.get(size)
        if own is not None and own.quantile is not None:
            return own.quantile
        known = [(each, window.quantile) for each, window in self._windows.items() if window.quantile is not None]
        smaller = max((entry for entry in known if entry[0] < size), default=None)
        if smaller is not None:
            return float(smaller[1] * 2.0 ** (size - smaller[0]))
        larger = min((entry for entry in known if entry[0] > size), default=None)
        return None if larger is None else larger[1]
