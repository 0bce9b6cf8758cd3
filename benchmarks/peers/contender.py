"""Who takes part in a race."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from benchmarks.peers.workload import Workload

Measured = Mapping[str, Mapping[str, float]]
"""Row -> metric -> value. Most contenders fill one row."""


class Contender(Protocol):
    """Alive only while it is measured: contenders never share the cores."""

    @property
    def row(self) -> str:
        """Its name in the table."""

    def missing(self) -> str | None:
        """How to install what it needs; None: all is there."""

    async def measure(self, workload: Workload, seed: int) -> Measured:
        """Starts it, measures, ends it. seed: of the prompts. Raises PeerFailed."""
