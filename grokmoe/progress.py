"""How far a long read has come, said every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

INTERVAL = 5.0
"""Seconds between two lines. What takes less is not spoken of before its end."""

GIB = 1 << 30


class Progress:
    """Counts bytes that were read. One thread at a time."""

    def __init__(
        self,
        what: str,
        total: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        interval: float = INTERVAL,
    ) -> None:
        """what: is read, such as "experts". total: bytes. say: takes a line. clock: in seconds."""
        self._what, self._total, self._say, self._clock, self._interval = what, total, say, clock, interval
        self._done = 0
        self._began = self._said = clock()

    def add(self, num_bytes: int) -> None:
        """So many more."""
        self._done += num_bytes
        now = self._clock()
        if now - self._said >= self._interval:
            self._said = now
            rate = self._done / (now - self._began)
            left = (self._total - self._done) / rate
            self._say(
                f"{self._what}: {self._done / GIB:.1f} of {self._total / GIB:.1f} GiB, "
                f"{rate / GIB:.2f} GiB/s, {left:.0f} s to go"
            )

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return self._clock() - self._began

    def end(self) -> str:
        """All of it in a line."""
        seconds = self.seconds
        return f"{self._done / GIB:.2f} GiB in {seconds:.1f} s, {self._done / GIB / max(seconds, 1e-9):.2f} GiB/s"
