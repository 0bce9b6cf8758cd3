"""One request on its way: the sequence, what it has produced, and the client that waits for it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from grokmoe.errors import GrokmoeError
from router.sequence import FinishReason, Sequence


class Generation:
    """Where the engine puts tokens and the service takes them from.

    Tokens that arrive before the client has taken the last ones are handed over together, so a slow client costs
    nothing but the list of its own tokens.
    """

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.arrived = time.monotonic()
        self.scheduled_at: float | None = None
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self._logits_by_start: dict[int, Any] = {}
        self._tokens: list[int] = []
        self._finish_reason: FinishReason | None = None
        self._error: GrokmoeError | None = None
        self._news = asyncio.Event()

    def note_scheduled(self) -> None:
        """The sequence takes part in a step."""
        if self.scheduled_at is None:
            self.scheduled_at = time.monotonic()

    def put(self, token_id: int, finish_reason: FinishReason | None) -> None:
        """A token was drawn."""
        now = time.monotonic()
        if self.first_token_at is None:
            self.first_token_at = now
        if finish_reason is not None:
            self.ended_at = now
            self._finish_reason = finish_reason
        self._tokens.append(token_id)
        self._news.set()

    def put_logits(self, start: int, logits_RV: Any) -> None:
        """Logits of positions start, start + 1, ... A recomputed chunk replaces what it computed before."""
        self._logits_by_start[start] = logits_RV

    def logits(self) -> list[tuple[int, Any]]:
        """(first position, logits) of the chunks computed, for a request with `logits`."""
        return sorted(self._logits_by_start.items(), key=lambda item: item[0])

    def fail(self, error: GrokmoeError) -> None:
        """It cannot be finished. The client gets the tokens so far first."""
        self._error = error
        self.ended_at = time.monotonic()
        self._news.set()

    async def take(self) -> tuple[list[int], FinishReason | None]:
        """The tokens since the last call, at least one, and why it ended if it has. Raises what `fail` was given."""
        await self._news.wait()
        self._news.clear()
        tokens, self._tokens = self._tokens, []
        if not tokens:
            assert self._error is not None, "woken without news"
            raise self._error
        if self._error is not None:
            self._news.set()
        return tokens, self._finish_reason
