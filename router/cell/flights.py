"""The steps of one worker that are under way, and the watches that cut them off.

begin ---> watched ---end, when its lane has seen to the outcome---> gone
              |
              +---cut_off_all: its lane finds that nobody waits for the result
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from router.cell.tempo import Tempo
from router.step import Step
from router.step_times import work_of
from router.step_watch import StepWatch


class Flights:
    """Steps and their watches, oldest first."""

    def __init__(self, tempo: Tempo, on_slow: Callable[[], None]) -> None:
        """on_slow: called when an answer has shown that the worker is slow."""
        self._tempo, self._on_slow = tempo, on_slow
        self._watches: dict[Step, StepWatch] = {}

    def __len__(self) -> int:
        return len(self._watches)

    def __iter__(self) -> Iterator[Step]:
        return iter(self._watches)

    def begin(self, step: Step) -> StepWatch:
        """A step begins."""

        def work() -> int:
            # Lanes share the worker's device: an answer may have to wait for another step's.
            return sum(map(work_of, self._watches)) or work_of(step)

        def observe(seconds: float) -> None:
            if self._tempo.observe(work(), seconds):
                self._on_slow()

        watch = self._watches[step] = StepWatch(lambda: self._tempo.allowance(work()), observe)
        return watch

    def end(self, step: Step) -> bool:
        """A step is over. False if it was before."""
        return self._watches.pop(step, None) is not None

    def steps_at(self, stage: str) -> list[Step]:
        """The steps that are in a stage of a pipeline, by its address; empty: all."""
        return [step for step, watch in self._watches.items() if stage in ("", watch.at)]

    def rearm(self) -> None:
        """What an answer may take can be another time now."""
        for watch in self._watches.values():
            watch.rearm()

    def abandon_all(self) -> None:
        """Cuts off all steps; they are under way until their lanes have noticed."""
        for watch in self._watches.values():
            watch.abandon()

    def abandon_unwanted(self) -> None:
        """Cuts off the steps that nobody waits for any more."""
        for step, watch in self._watches.items():
            if is_unwanted(step):
                watch.abandon()

    def cut_off_all(self) -> None:
        """Cuts off all steps and forgets them."""
        self.abandon_all()
        self._watches.clear()


def is_unwanted(step: Step) -> bool:
    """Whether nobody waits for any of its sequences."""
    return all(chunk.sequence.is_over for chunk in step.chunks)
