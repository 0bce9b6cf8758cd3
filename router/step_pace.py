"""Whether an attention worker is slow beside the others, though it answers. Pure; the clock is given.

            too much lost, or too late though alive                  pause over
      EVEN ----------------------------------------> SLOW ----------------------------> TRIAL
       ^                                               ^                                  |
       |                                               +-- the same again, pause doubles -+
       +------------------ enough answers in time ----------------------------------------+

What counts is the time lost: whatever an answer took beyond several times what the best of the others takes for as
much work. What is regained by quick answers is taken off, so a worker that is merely uneven is never slow, and one long
answer alone is not enough. A worker that is slow gets no new sequences while a better one has room, and gives away
those it has; on trial it gets one at a time. With nobody better it is used as if nothing were the matter.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Callable


class Pace(enum.Enum):
    """EVEN: about as fast as the others. SLOW: to be avoided. TRIAL: was slow; may show that it no longer is."""

    EVEN = "even"
    SLOW = "slow"
    TRIAL = "trial"


@dataclasses.dataclass(frozen=True)
class StepPaceSettings:
    """Named limits, seconds unless said otherwise."""

    factor: float = 4.0
    """Times what the best of the others takes. Below it, work of one class differs as much; above, to recompute a
    sequence elsewhere is soon paid back."""
    margin: float = 0.003
    """Lost by every answer without being counted: a hand-over between threads on a busy machine."""
    max_lost: float = 0.3
    """In all. With the rest of a step it stays near half a second that a client may notice."""
    max_share: float = 0.5
    """Part of `max_lost` that one answer can bring: a pause of the whole process is no pace."""
    first_pause: float = 1.0
    """Before a slow worker is tried again."""
    max_pause: float = 60.0
    """The pause doubles with every trial that fails, up to this one."""
    trial_answers: int = 64
    """Answers on trial without a relapse after which all is forgotten: a few steps."""
    stable_after: float = 5.0
    """A worker that is slow again sooner than this after a trial goes on with the pause it had."""


class StepPace:
    """One worker's."""

    def __init__(self, settings: StepPaceSettings | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings or StepPaceSettings(), clock
        self._is_even = True
        self._lost = 0.0
        self._pause = 0.0
        self._tried_at = 0.0
        self._num_answers = 0
        self._even_since = clock()

    @property
    def pace(self) -> Pace:
        """As of now."""
        if self._is_even:
            return Pace.EVEN
        return Pace.SLOW if self._clock() < self._tried_at else Pace.TRIAL

    def observe(self, seconds: float, others: float | None) -> bool:
        """An answer came. others: what the best of the others takes for as much work; None: there are none to compare.

        Returns whether the worker has just become slow.
        """
        pace, limits = self.pace, self._settings
        if others is None or pace is Pace.SLOW:
            return False
        most = limits.max_share * limits.max_lost
        self._lost = max(0.0, self._lost + min(seconds - limits.factor * others - limits.margin, most))
        if self._lost >= limits.max_lost:
            self._become_slow()
            return True
        if pace is Pace.TRIAL:
            self._num_answers += 1
            if self._num_answers >= limits.trial_answers:
                self._is_even, self._even_since, self._lost = True, self._clock(), 0.0
        return False

    def alarm(self) -> None:
        """It took longer than it may, and is alive."""
        self._become_slow()

    def _become_slow(self) -> None:
        limits, now = self._settings, self._clock()
        is_relapse = not self._is_even or (self._pause > 0 and now - self._even_since < limits.stable_after)
        self._pause = min(2 * self._pause, limits.max_pause) if is_relapse else limits.first_pause
        self._is_even, self._lost, self._num_answers = False, 0.0, 0
        self._tried_at = now + self._pause
