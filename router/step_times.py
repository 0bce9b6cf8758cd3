"""What one attention worker takes for its part of a layer, by how much work it is. Pure.

Work is classed by powers of two. Per class the last times are kept, and of them two numbers: the usual one, their
median, and the long one, which nine of ten are below. Neither is moved by a single answer that took seconds, so a pause
of the machine does not change what is expected of the next answer.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

from router.step import Step

POSITION_WORK = 1024
"""What the linear layers of one token cost, in positions that attention looks at. Between small models and Grok-1 it
is right within a factor of ten, which is enough to tell a decode from a long prefill."""

WINDOW = 256
"""Times remembered per class of work: a few steps of a deep model, and few enough to forget a bad day."""

MIN_SAMPLES = 4
"""Times to know before a class counts: one step of a small model has as many."""

REFRESH = 16
"""Both numbers are found anew after so many times, and while there are fewer at every power of two."""

LONG_QUANTILE = 0.9
"""Of the times of a class; the longest one of all is never taken."""


def work_of(step: Step) -> int:
    """A measure of what a step costs an attention worker per layer."""
    return sum(len(chunk.token_ids) * (POSITION_WORK + chunk.end) for chunk in step.chunks)


class _Window:
    """The last times of one class of work."""

    def __init__(self) -> None:
        self._seconds: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._count = 0
        self.usual = self.long = 0.0

    @property
    def is_known(self) -> bool:
        """Whether the two numbers mean anything."""
        return self._count >= MIN_SAMPLES

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)
        self._count += 1
        count = self._count
        is_power = count & (count - 1) == 0
        if count % REFRESH == 0 or (MIN_SAMPLES <= count < REFRESH and is_power):
            ordered = sorted(self._seconds)
            self.usual = ordered[(len(ordered) - 1) // 2]
            self.long = ordered[min(int(LONG_QUANTILE * len(ordered)), len(ordered) - 2)]


class StepTimes:
    """One worker's times since it joined."""

    def __init__(self) -> None:
        self._windows: dict[int, _Window] = {}

    def add(self, work: int, seconds: float) -> None:
        """The worker took `seconds` for one layer of so much work."""
        size = work.bit_length()
        window = self._windows.get(size)
        if window is None:
            window = self._windows[size] = _Window()
        window.add(seconds)

    def is_known(self, work: int) -> bool:
        """Whether so much work has been seen itself, and not only more or less of it."""
        window = self._windows.get(work.bit_length())
        return window is not None and window.is_known

    def usual(self, work: int) -> float | None:
        """The median for one layer of so much work; None: nothing is known."""
        return self._of(work, lambda window: window.usual)

    def long(self, work: int) -> float | None:
        """What nine of ten answers are below; None: nothing is known."""
        return self._of(work, lambda window: window.long)

    def _of(self, work: int, which: Callable[[_Window], float]) -> float | None:
        size = work.bit_length()
        window = self._windows.get(size)
        if window is None or not window.is_known:
            return self._estimate(size, which)
        # More work that takes less says that the few times of this class are of a bad moment, such as a first step.
        return min(which(each) for other, each in self._windows.items() if other >= size and each.is_known)

    def _estimate(self, size: int, which: Callable[[_Window], float]) -> float | None:
        """For a class that is not known. Time grows with the work, and at most as the work does: the next smaller
        class, scaled up, and the next larger one are both more than it, so the lesser of them is taken."""
        known = {each: window for each, window in self._windows.items() if window.is_known}
        smaller = max((each for each in known if each < size), default=None)
        larger = min((each for each in known if each > size), default=None)
        bounds = []
        if smaller is not None:
            bounds.append(which(known[smaller]) * 2.0 ** (size - smaller))
        if larger is not None:
            bounds.append(which(known[larger]))
        return min(bounds, default=None)
