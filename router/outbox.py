"""Streams that have something to send, one after another, in slices of the event loop's time.

A step gives every sequence in it a token at once. If each of hundreds of streams woke a task of its own, nothing else
would run on the loop until the last had written; here the loop gets around after every slice, and the next step's
result, a new call or a probe waits for one slice and not for all.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable

SLICE = 0.0005
"""Seconds of writing before others get their turn: some ten messages. A quarter of what the loop may be late."""


class Outbox:
    """One service's, on one event loop."""

    def __init__(self, slice_seconds: float = SLICE, clock: Callable[[], float] = time.perf_counter) -> None:
        self._slice, self._clock = slice_seconds, clock
        self._ready: collections.deque[Callable[[], None]] = collections.deque()
        self._is_due = False

    def add(self, send: Callable[[], None]) -> None:
        """Has `send` called soon, after those that were added before. It must not raise."""
        self._ready.append(send)
        self._arrange()

    def _arrange(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._send_some)

    def _send_some(self) -> None:
        self._is_due = False
        end = self._clock() + self._slice
        while self._ready:
            self._ready.popleft()()
            if self._clock() >= end:
                break
        if self._ready:
            self._arrange()
