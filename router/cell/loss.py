"""One loss of a worker, and whether it is counted against the sequences that were in a step on it.

lost, counted ---the same process is back---> acquitted: none of them has killed it
    |     |
    |     +---another process is back-------> counted for good
    |
    +---it hung, but answers a question---> not counted: it is alive, and slow
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from grokmoe.errors import GrokmoeError
from router.sequence import Sequence
from router.transport.base import AttentionLink


class Loss:
    """victims: the sequences that were in a step; none when the case is closed."""

    def __init__(self, victims: Iterable[Sequence] = ()) -> None:
        self.victims = list(victims)
        for sequence in self.victims:
            sequence.num_migrations += 1

    def acquit(self) -> None:
        """It lives, so none of them has killed it."""
        for sequence in self.victims:
            sequence.num_acquitted += 1
        self.close()

    def close(self) -> None:
        """Nothing more can be found out."""
        self.victims.clear()

    def void(self) -> None:
        """It was none: nothing is counted."""
        for sequence in self.victims:
            sequence.num_migrations -= 1
        self.close()


async def is_alive(link: AttentionLink, within: float) -> bool:
    """Whether a worker answers a question in so many seconds."""
    try:
        async with asyncio.timeout(within):
            await link.describe()
    except (GrokmoeError, TimeoutError):
        return False
    return True
