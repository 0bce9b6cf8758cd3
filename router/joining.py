"""The wait for all workers at start."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence

from grokmoe.errors import ConfigError, GrokmoeError, Unavailable

logger = logging.getLogger(__name__)

JOIN_INTERVAL = 0.2
"""Pause between two attempts to reach workers at start, seconds."""

ProgressLine = Callable[[str], None]


@dataclasses.dataclass
class Join:
    """One worker to wait for. last_error: why it has not joined yet."""

    who: str
    address: str
    connect: Callable[[], Awaitable[None]]
    last_error: str = ""
    has_joined: bool = False


async def join_all(joins: Sequence[Join], timeout: float, progress: ProgressLine) -> None:
    """Waits until all have joined. progress: receives a line whenever one does.

    Raises ConfigError when one does not fit, Unavailable, naming who is missing and why, after `timeout` seconds.
    """
    joined = itertools.count(1)

    async def join(each: Join) -> None:
        while True:
            try:
                await each.connect()
            except ConfigError:
                raise
            except (GrokmoeError, TimeoutError) as error:
                if str(error) != each.last_error:
                    logger.info("waiting for %s at %s: %s", each.who, each.address, error)
                each.last_error = str(error)
                await asyncio.sleep(JOIN_INTERVAL)
                continue
            each.has_joined = True
            progress(f"{each.who} at {each.address} joined ({next(joined)} of {len(joins)})")
            return

    try:
        async with asyncio.timeout(timeout):
            async with asyncio.TaskGroup() as group:
                for each in joins:
                    group.create_task(join(each))
    except TimeoutError:
        missing = "; ".join(f"{each.who} at {each.address}: {each.last_error}" for each in joins if not each.has_joined)
        raise Unavailable(f"not reachable within {timeout:g} s: {missing}") from None
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
