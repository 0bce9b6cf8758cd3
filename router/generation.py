"""One request on its way: its candidates, what they have produced, and the client that waits for it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from collections.abc import Sequence as Listed
from typing import Any

from grokmoe.errors import GrokmoeError
from grokmoe.step_plan import LogprobTable
from router.admission import CallContext
from router.request import Request
from router.sequence import FinishReason, Sequence
from router.step import Drawn

NOBODY = CallContext()


def _ignore(seconds: float) -> None:
    pass


@dataclasses.dataclass(slots=True)
class Delivery:
    """What one candidate produced since the last delivery. `logprobs`: a table per token, if asked for."""

    index: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[LogprobTable] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None


class Generation:
    """Where the engine puts tokens and the service takes them from.

    Tokens that arrive before the client has taken the last ones are handed over together, so a slow client costs
    nothing but the list of its own tokens.

    news_at: when the first of what can be taken came.
    """

    def __init__(
        self,
        request: Request,
        call: CallContext,
        sequences: Listed[Sequence],
        on_scheduled: Callable[[Generation], None],
    ) -> None:
        """sequences: one per candidate, in their order. on_scheduled: called when the first takes part in a step."""
        self.call = call
        self._on_scheduled = on_scheduled
        self.request, self.sequences = request, tuple(sequences)
        self.arrived = time.monotonic()
        self.scheduled_at: float | None = None
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self.on_gap: Callable[[float], None] = _ignore
        """Told the seconds between two tokens of a candidate, one after another."""
        self._last_token_at: dict[int, float] = {}
        self._num_live = len(self.sequences)
        self._logits_by_start: dict[int, Any] = {}
        self._prompt_logprobs_by_start: dict[int, LogprobTable] = {}
        self._deliveries: dict[int, Delivery] = {}
        self._error: GrokmoeError | None = None
        self._news = asyncio.Event()
        self._tell: Callable[[], None] = self._news.set
        self._is_quiet = False
        self.news_at = 0.0

    def listen(self, tell: Callable[[], None]) -> None:
        """From now on calls `tell` when there is something to take, and at once if there is already. It must be cheap:
        it may be called again before anything is taken."""
        self._tell = tell
        if self.has_news:
            tell()

    def wait_for_end(self) -> None:
        """From now on nobody is told before every candidate has ended, or the request has failed."""
        self._is_quiet = True

    def note_scheduled(self) -> None:
        """A sequence takes part in a step."""
        if self.scheduled_at is None:
            self.scheduled_at = time.monotonic()
            self._on_scheduled(self)

    def note_ended(self) -> None:
        """Nobody waits for more, also if the engine would have gone on."""
        if self.ended_at is None:
            self.ended_at = time.monotonic()

    def put(self, drawn: Drawn, logprobs: LogprobTable | None = None) -> None:
        """A step has ended for one candidate."""
        now = time.monotonic()
        if not self._deliveries:
            self.news_at = now
        delivery = self._delivery(drawn.sequence.index)
        if drawn.token_id is not None:
            delivery.token_ids.append(drawn.token_id)
            if self.first_token_at is None:
                self.first_token_at = now
            last = self._last_token_at.get(drawn.sequence.index)
            if last is not None:
                self.on_gap(now - last)
            self._last_token_at[drawn.sequence.index] = now
        if logprobs is not None:
            delivery.logprobs.append(logprobs)
        if drawn.finish_reason is not None:
            self._end(delivery, drawn.finish_reason)
        self._announce()

    def abort(self, sequence: Sequence) -> None:
        """A candidate has been ended from outside; its client gets what there is."""
        self._end(self._delivery(sequence.index), FinishReason.ABORTED)
        self._announce()

    def _announce(self) -> None:
        if not self._is_quiet or self._num_live == 0:
            self._tell()

    def _delivery(self, index: int) -> Delivery:
        """What the next `take` gives of a candidate. Made only if it is not there: this runs for every token."""
        delivery = self._deliveries.get(index)
        if delivery is None:
            delivery = self._deliveries[index] = Delivery(index)
        return delivery

    def _end(self, delivery: Delivery, reason: FinishReason) -> None:
        delivery.finish_reason = reason
        self._num_live -= 1
        if self._num_live == 0:
            self.note_ended()

    def put_logits(self, start: int, logits_RV: Any) -> None:
        """Logits of positions start, start + 1, ... A prompt that is recomputed begins anew."""
        if start == 0:
            self._logits_by_start.clear()
        self._logits_by_start[start] = logits_RV

    def logits(self) -> list[tuple[int, Any]]:
        """(first position, logits) of the chunks computed, for a request with `logits`."""
        return sorted(self._logits_by_start.items(), key=lambda item: item[0])

    def put_prompt_logprobs(self, start: int, table: LogprobTable) -> None:
        """Log-probabilities of the prompt's tokens start + 1, start + 2, ... A recomputation begins anew."""
        if start == 0:
            self._prompt_logprobs_by_start.clear()
        self._prompt_logprobs_by_start[start] = table

    def prompt_logprobs(self) -> list[LogprobTable]:
        """Those of the prompt from its second token on, in order. Complete with the first delivery."""
        return [table for _, table in sorted(self._prompt_logprobs_by_start.items())]

    def fail(self, error: GrokmoeError) -> None:
        """It cannot be finished. The client gets the tokens so far first."""
        self._error = error
        self.ended_at = time.monotonic()
        self._tell()

    @property
    def failure(self) -> str:
        """What it has failed with; empty if it has not."""
        return "" if self._error is None else self._error.message

    @property
    def has_news(self) -> bool:
        """Whether there is something to take, or to raise."""
        return bool(self._deliveries) or self._error is not None

    def take_now(self) -> list[Delivery]:
        """What came since the last call; nothing, if nothing did. Raises what `fail` was given after the last of it."""
        deliveries, self._deliveries = list(self._deliveries.values()), {}
        if not deliveries and self._error is not None:
            raise self._error
        return deliveries

    async def take(self) -> list[Delivery]:
        """What came since the last call, at least one delivery. Raises what `fail` was given."""
        await self._news.wait()
        self._news.clear()
        deliveries = self.take_now()
        assert deliveries, "woken without news"
        if self._error is not None:
            self._news.set()
        return deliveries
