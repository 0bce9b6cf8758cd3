"""A loop that is held up is late."""

from __future__ import annotations

import asyncio
import time

from grokmoe.loop_lag import INTERVAL, watch_lag


def test_as_late_as_the_loop_was_held_up() -> None:
    async def main() -> None:
        seen: list[float] = []
        watching = asyncio.create_task(watch_lag(seen.append))
        await asyncio.sleep(0)
        held = 0.3
        time.sleep(INTERVAL + held)  # noqa: ASYNC251 - what is to be noticed
        while not seen:  # noqa: ASYNC110
            await asyncio.sleep(INTERVAL)
        watching.cancel()
        assert seen[0] >= 0.9 * held
        assert min(seen) >= 0

    asyncio.run(main())
