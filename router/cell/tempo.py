"""What a worker's answers take: how long the next one may, and whether the worker is slow beside the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router.cell.neighbour import Neighbour
from router.step_deadline import StepDeadline, StepDeadlineSettings
from router.step_pace import Pace, StepPace, StepPaceSettings
from router.step_times import StepTimes


class Tempo:
    """One worker's limit and pace, compared with those of the workers that are in use beside it.

    pace: its own verdict, over many answers.
    """

    def __init__(
        self, deadline: StepDeadlineSettings, pace: StepPaceSettings, others: Callable[[], Sequence[Neighbour]]
    ) -> None:
        """others: the other workers in use."""
        self._settings, self._others = (deadline, pace), others
        self.start_over()

    def start_over(self) -> None:
        """The worker is another process: nothing is known of it."""
        deadline, pace = self._settings
        self._deadline, self.pace = StepDeadline(deadline), StepPace(pace)

    @property
    def times(self) -> StepTimes:
        """What its answers took."""
        return self._deadline.times

    @property
    def is_slow(self) -> bool:
        """Whether it is to be avoided."""
        return self.pace.pace is Pace.SLOW

    def allowance(self, work: int) -> float | None:
        """Seconds that the next answer may take with so much work; None: it is waited for, since there is no other."""
        others = self._others()
        if not others:
            return None
        is_lenient = all(other.is_slow for other in others)
        return self._deadline.allowance(work, [other.times for other in others], is_lenient)

    def observe(self, work: int, seconds: float) -> bool:
        """An answer took so long. Returns whether the worker has just become slow."""
        self._deadline.observe(work, seconds)
        peers = [other.times for other in self._others() if not other.is_slow and other.times.is_known(work)]
        known = [usual for times in peers if (usual := times.usual(work)) is not None]
        return self.pace.observe(seconds, min(known, default=None))
