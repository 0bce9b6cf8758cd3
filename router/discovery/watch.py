"""Looks for workers again and again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from router.discovery.addresses import Changes, changes
from router.discovery.sources import INTERVAL, Sources

logger = logging.getLogger(__name__)


class Discovery:
    """Looks again and again, and tells what has changed."""

    def __init__(
        self,
        sources: Sources,
        known: Sequence[str],
        apply: Callable[[Changes], Awaitable[None] | None],
        interval: float = INTERVAL,
    ) -> None:
        """known: the addresses in use already. apply: does what has to be done; called with a change only."""
        self._sources, self._known, self._apply, self._interval = sources, list(known), apply, interval
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to look, if there is anything that can change."""
        if self._task is None and self._sources.may_change:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="discovery")

    def stop(self) -> None:
        """Ends it."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.look()
            except Exception:
                logger.exception("looking for workers failed")

    async def look(self) -> None:
        """Looks once."""
        found = await self._sources.find()
        change = changes(self._known, found)
        if not change:
            return
        logger.info("workers: added %s; removed %s", change.added or "none", change.removed or "none")
        self._known = found
        applied = self._apply(change)
        if applied is not None:
            await applied
