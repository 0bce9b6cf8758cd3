"""What went wrong with attention workers and what was done about it, since start."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class FaultCounters:
    """Sums over all cells of an engine; they only grow.

    losses: times a worker was lost while in use.
    hangs: of these, because it took too long.
    migrations: sequences that were in a step on a worker when it was lost, and are computed again.
    moves: sequences that left a worker that drains or is slow.
    migration_limits: requests ended because they had lost their worker too often.
    faulty_chunks: chunks that came out as something that is not finite.
    abandoned_steps: steps cut off because nobody wanted them any more.
    lane_restarts: bugs of ours that ended a lane.
    book_errors: times an invariant did not hold.
    """

    losses: int = 0
    hangs: int = 0
    migrations: int = 0
    moves: int = 0
    migration_limits: int = 0
    faulty_chunks: int = 0
    abandoned_steps: int = 0
    lane_restarts: int = 0
    book_errors: int = 0
