"""Whether a request may wait: bounds on the queue, checked before anything is done for it.

Pure: told what waits, it says yes or raises. Order within the queue is router/fair_share.py.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from grokmoe.errors import ConfigError, Reason, ResourceExhausted

MIN_RETRY, MAX_RETRY = 0.1, 30.0
"""Bounds of the time after which a refused caller is told to try again, seconds."""

_SMOOTHING = 0.2


@dataclasses.dataclass(frozen=True)
class CallContext:
    """Who asks, and for how long.

    caller: shares are per caller; empty: nobody in particular.
    priority: levels of head start, from -2 to 2.
    deadline: time.monotonic() at which nobody waits any more; None: never.
    trace_context: what it says of the trace that it belongs to, see grokmoe.tracing.TRACE_KEYS.
    """

    caller: str = ""
    priority: int = 0
    deadline: float | None = None
    trace_context: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class AdmissionSettings:
    """Bounds of the queue. One sequence is one candidate of a request."""

    max_waiting: int = 1024
    """Sequences that may wait for their first step."""
    max_waiting_kv: float = 16.0
    """Prompts that may wait, in multiples of what all KV pages hold."""
    max_live_per_caller: int = 0
    """Sequences of one caller, waiting and running; 0: no bound of its own."""
    queue_timeout: float = 0.0
    """Seconds after which a request that has not begun is refused after all; 0: never, its deadline ends it."""

    def __post_init__(self) -> None:
        if self.max_waiting < 1:
            raise ConfigError(f"max_waiting is {self.max_waiting}, must be at least 1")
        if not self.max_waiting_kv > 0:
            raise ConfigError(f"max_waiting_kv is {self.max_waiting_kv}, must be above 0")
        for name in ("max_live_per_caller", "queue_timeout"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least 0")


class Admission:
    """The books that bounds are checked against."""

    def __init__(self, settings: AdmissionSettings) -> None:
        self.settings = settings
        self.num_refused = 0
        self._live: Counter[str] = Counter()
        self._interval = MIN_RETRY
        self._last_begin: float | None = None

    def check(
        self, caller: str, count: int, num_tokens: int, num_waiting: int, waiting_tokens: int, kv_tokens: int
    ) -> None:
        """Raises ResourceExhausted if `count` more sequences of `num_tokens` prompt tokens each are too many.

        num_waiting, waiting_tokens: what waits now. kv_tokens: what all KV pages hold.
        """
        settings = self.settings
        if num_waiting + count > settings.max_waiting:
            raise self._full(
                f"{num_waiting} sequences wait already, limit is {settings.max_waiting}", Reason.QUEUE_FULL, num_waiting
            )
        limit = int(settings.max_waiting_kv * kv_tokens)
        # A prompt that fits in the pages is never too long for an empty queue.
        if num_waiting and waiting_tokens + num_tokens > limit:
            message = f"{waiting_tokens} tokens wait already, with these {num_tokens} the limit of {limit} is passed"
            raise self._full(message, Reason.QUEUE_FULL, num_waiting)
        most = settings.max_live_per_caller
        if most and self._live[caller] + count > most:
            message = f"{self._live[caller]} sequences of this caller are waiting or running, limit is {most}"
            raise self._full(message, Reason.CALLER_LIMIT, num_waiting)

    def timed_out(self, waited: float, num_waiting: int) -> ResourceExhausted:
        """The error of a request that has waited for too long."""
        return self._full(f"waited {waited:.1f} s for a first step", Reason.QUEUE_TIMEOUT, num_waiting)

    def added(self, caller: str, count: int) -> None:
        """Sequences of a caller are alive."""
        self._live[caller] += count

    def ended(self, caller: str) -> None:
        """One of them has ended."""
        self._live[caller] -= 1
        if self._live[caller] <= 0:
            del self._live[caller]

    def begun(self, now: float) -> None:
        """A request got its first step at this time: how often that happens is what a retry waits for."""
        if self._last_begin is not None:
            self._interval += _SMOOTHING * (now - self._last_begin - self._interval)
        self._last_begin = now

    def live_of(self, caller: str) -> int:
        """Sequences of a caller that are alive."""
        return self._live[caller]

    def _full(self, message: str, reason: Reason, num_waiting: int) -> ResourceExhausted:
        """Half of the queue should have begun by the time of a retry."""
        self.num_refused += 1
        delay = min(MAX_RETRY, max(MIN_RETRY, self._interval * num_waiting / 2))
        return ResourceExhausted(message, retry_after=delay, reason=reason)
