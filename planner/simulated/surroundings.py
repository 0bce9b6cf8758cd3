"""What a simulated worker finds around it."""

from __future__ import annotations

from typing import Protocol

from planner.shape import StepShape
from planner.simulated.clock import Clock
from planner.simulated.routing import Routing
from planner.simulated.step_costs import StepCosts
from router.sequence import Sequence
from router.step import Drawn, SchedulerSettings


class Surroundings(Protocol):
    """num_pages, page_size: of an attention worker."""

    clock: Clock
    routing: Routing
    scheduler_settings: SchedulerSettings
    num_pages: int
    page_size: int

    def costs_of(self, shape: StepShape) -> StepCosts:
        """What a step takes."""

    def note(self, drawn: Drawn) -> None:
        """A sequence has got a token, or its last."""

    def note_moved(self, sequence: Sequence) -> None:
        """A sequence has lost its attention worker."""
