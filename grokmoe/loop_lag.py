"""How late an event loop is: what a message that has just come waits before anything is done about it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

INTERVAL = 0.02
"""Seconds between two looks: fifty a second cost nothing, and a loop that stands still now and then is found out."""


async def watch_lag(observe: Callable[[float], None]) -> None:
    """Tells `observe` again and again how many seconds later than asked for it was called. Runs until cancelled.

    Timers of event loops count in milliseconds, so up to one of them is the timer's and not the loop's.
    """
    while True:
        due = time.monotonic() + INTERVAL
        await asyncio.sleep(INTERVAL)
        observe(max(0.0, time.monotonic() - due))
