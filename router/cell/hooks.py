"""What a cell needs of the engine around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from collections.abc import Sequence as Listed

from grokmoe.errors import GrokmoeError
from router.cell.neighbour import Neighbour
from router.generation import Generation
from router.legs import Legs
from router.sequence import Sequence
from router.step import Step
from router.transport.base import AttentionInfo, Hole

MakeHole = Callable[[int, Legs, float | None], Hole]
"""(lane, legs, deadline) -> who fills the MoE of a step. deadline: time.monotonic() after which nobody waits for it."""


@dataclasses.dataclass(frozen=True)
class CellHooks:
    """One cell's."""

    make_hole: MakeHole
    """Who fills the MoE of a step."""
    generation_of: Callable[[Sequence], Generation | None]
    """The generation a sequence belongs to; None when the client has gone."""
    step_begins: Callable[[Step], tuple[str, ...]]
    """On the task that runs the step. Returns what the plan says of the traces that the step is written to."""
    step_done: Callable[[Step, float, Legs], None]
    """(step, seconds, legs): for metrics and traces. On the task that has run the step."""
    step_failed: Callable[[Step, float, GrokmoeError], None]
    """(step, seconds, why): for traces. On the same task; the requests that it took along may be gone."""
    rehome: Callable[[list[Sequence]], None]
    """Finds another cell, or this one again, for the sequences of a worker that was lost or drains."""
    ended: Callable[[Sequence], None]
    """A sequence has ended, well or not."""
    failed: Callable[[Sequence, GrokmoeError], None]
    """The request of a sequence, if it is alive, ends with an error."""
    sequences: Callable[[], list[Sequence]]
    """All that the engine believes to be in the cell."""
    others: Callable[[], Listed[Neighbour]]
    """The other cells that are in use."""
    changed: Callable[[], None]
    """The state of the cell is another one."""
    bring: Callable[[AttentionInfo], Awaitable[AttentionInfo]]
    """Loads the adapters there are into the worker, which has described itself so; what it says of itself then."""
    adopted: Callable[[], None]
    """The worker is in use with the adapters that it has now."""

    def note_scheduled(self, step: Step) -> None:
        """A step begins."""
        for chunk in step.chunks:
            generation = self.generation_of(chunk.sequence)
            if generation is not None:
                generation.note_scheduled()

    def last_deadline(self, step: Step) -> float | None:
        """When nobody waits for any of a step's sequences any more; None: somebody has no deadline."""
        generations = (self.generation_of(chunk.sequence) for chunk in step.chunks)
        deadlines = [generation.call.deadline for generation in generations if generation is not None]
        known = [deadline for deadline in deadlines if deadline is not None]
        return max(known) if known and len(known) == len(deadlines) else None
