"""What a worker holds, loads and gives up, as a table of cells. Pure: the weights themselves are in `experts`.

    absent -> loading -> held -> lingering -> freeing -> absent
                 |         ^         |           ^
                 |         +---------+           |  wanted again before its time is up: nothing is read
                 +-------------------------------+  the load failed, or its caller left

Only what is held is described. What lingers can still be called, because callers learn late that it was given up.
What is being loaded and lingers, too, is not freed; if that load fails, it lingers on.
"""

from __future__ import annotations

from expert_worker.cells import Cell, Cells
from grokmoe.errors import ConfigError, Reason, ResourceExhausted
from grokmoe.expert_ranges import size_of

FIRST_REVISION = 1
"""Not 0, which is what a message says that says nothing."""


class Holdings:
    """The table of one worker. Times are of any one clock, in seconds; every set is replaced, never changed.

    held, loading, freeing: see above. revision: grows by one whenever `held` changes.
    """

    def __init__(self, held: Cells = frozenset(), capacity: int = 0) -> None:
        """capacity: most (expert, layer) pairs whose weights may be there at a time, a slice counting as its part of
        one; 0: unlimited. Raises ConfigError.
        """
        if capacity and size_of(held) > capacity:
            raise ConfigError(f"experts names {size_of(held)} (expert, layer) pairs, capacity is {capacity}")
        self.held = held
        self.loading: Cells = frozenset()
        self.freeing: Cells = frozenset()
        self.revision = FIRST_REVISION
        self.capacity = capacity
        self._lingering: dict[Cell, float] = {}

    @property
    def lingering(self) -> Cells:
        """Given up, and still served."""
        return frozenset(self._lingering)

    @property
    def resident(self) -> Cells:
        """All that has weights here, or is about to."""
        return self.held | self.loading | self.lingering | self.freeing

    def next_expiry(self) -> float | None:
        """When the next cell's time is up."""
        return min((until for cell, until in self._lingering.items() if cell not in self.loading), default=None)

    def must_wait(self, wanted: Cells) -> bool:
        """Whether a load has to wait until something is freed. Raises ResourceExhausted when that would not help."""
        if wanted & self.freeing:
            return True
        if not self.capacity or size_of(self.resident | wanted) <= self.capacity:
            return False
        if size_of(self.held | self.loading | wanted) > self.capacity:
            held, missing = size_of(self.held), size_of(wanted - self.held)
            raise ResourceExhausted(
                f"holds {held} (expert, layer) pairs and is to load {missing}, capacity is {self.capacity}",
                reason=Reason.NO_ROOM,
            )
        return True

    def begin_load(self, wanted: Cells) -> Cells:
        """Returns what must be read. One load at a time, which `must_wait` has let through."""
        assert not self.loading
        assert not wanted & self.freeing
        self.loading = wanted - self.held
        return self.loading - self.lingering

    def finish_load(self) -> None:
        """All that was being loaded is held."""
        for cell in self.loading:
            self._lingering.pop(cell, None)
        if self.loading:
            self.held |= self.loading
            self.revision += 1
        self.loading = frozenset()

    def abandon_load(self) -> Cells:
        """The load has failed. Returns what is to be freed: what it has read so far, and what it never came to."""
        due = self.loading - self.lingering
        self.freeing |= due
        self.loading = frozenset()
        return due

    def give_up(self, unwanted: Cells, until: float) -> None:
        """Lets go of what is held of `unwanted`; it is served until then."""
        gone = self.held & unwanted
        if gone:
            self.held -= gone
            self._lingering |= dict.fromkeys(gone, until)
            self.revision += 1

    def begin_free(self, now: float) -> Cells:
        """Returns what is to be freed now, because its time is up."""
        due = frozenset(c for c, until in self._lingering.items() if until <= now and c not in self.loading)
        for cell in due:
            del self._lingering[cell]
        self.freeing |= due
        return due

    def finish_free(self, cells: Cells) -> None:
        """Its memory is free."""
        assert cells <= self.freeing
        self.freeing -= cells
