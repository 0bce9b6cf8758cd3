"""Whose pages these are: one router at a time may speak of them. Pure; the clock is given.

        +--------------- claim by the same router: same incarnation
        v                       |
      FREE --claim--> HELD ----(ends)----> FREE --claim by another: new incarnation--> HELD
                       ^ |
                       +-+ step, Describe: goes on

A lease that has ended is not taken away before somebody else wants it: the pages are as their last holder left them, so
if it comes back first it has lost nothing. A new holder gets a new incarnation, so that plans of the old one, who may
not have noticed, are refused.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

from grokmoe.errors import Reason, Unavailable

LEASE_SECONDS = 10.0
"""A holder whose streams look open and who has said nothing for so long is gone: a host that lost power or its network
closes no stream. Above the pauses that a garbage collector or a busy machine makes."""

RELEASE_SECONDS = 1.0
"""The same when none of its streams is open: a process that was killed. Twice the pause between two of a router's
questions (router/attention_member.py, CellSettings.heartbeat), so a router that rests keeps its lease."""


def new_incarnation() -> str:
    """A name that was never used before."""
    return uuid.uuid4().hex


class Lease:
    """One worker's lease of all its pages.

    incarnation: what plans must name.
    holder: the router that has the lease, or had it last; empty: nobody yet.
    """

    def __init__(
        self,
        incarnation: str,
        seconds: float = LEASE_SECONDS,
        release_seconds: float = RELEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], str] = new_incarnation,
    ) -> None:
        """incarnation: the first holder's. draw: gives those of later ones."""
        self.incarnation, self.holder = incarnation, ""
        self._seconds, self._release_seconds = seconds, min(seconds, release_seconds)
        self._clock, self._draw = clock, draw
        self._since = self._heard = clock()
        self._num_streams = 0

    @property
    def seconds_left(self) -> float:
        """How long the lease lasts if its holder says nothing more; 0: free."""
        if not self.holder:
            return 0.0
        lasts = self._seconds if self._num_streams else self._release_seconds
        return max(0.0, self._heard + lasts - self._clock())

    def claim(self, router_id: str) -> str:
        """Takes the lease, or goes on with it. Returns the incarnation that it names.

        Raises Unavailable, saying who has it and since when, while another router does.
        """
        now = self._clock()
        if router_id != self.holder:
            if left := self.seconds_left:
                raise Unavailable(
                    f"leased by router {self.holder} for {now - self._since:.1f} s; "
                    f"free {left:.1f} s after its last sign of life",
                    retry_after=left,
                    reason=Reason.WORKER_UNAVAILABLE,
                )
            if self.holder:
                self.incarnation = self._draw()
            self.holder, self._since, self._num_streams = router_id, now, 0
        self._heard = now
        return self.incarnation

    def renew(self, incarnation: str) -> None:
        """A message of a step came that names this incarnation; another than the current one changes nothing."""
        if incarnation == self.incarnation:
            self._heard = self._clock()

    def stream_opened(self, incarnation: str) -> None:
        """The first plan on a stream names this incarnation. `stream_closed` must be called with the same."""
        if incarnation == self.incarnation:
            self._num_streams += 1
            self._heard = self._clock()

    def stream_closed(self, incarnation: str) -> None:
        """Such a stream has ended."""
        if incarnation == self.incarnation:
            self._num_streams -= 1
            self._heard = self._clock()
