"""Workers come and go: what discovery finds becomes cells of the engine and members of its expert pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router.cell import AttentionCell
from router.discovery import Changes, Discovery, Sources
from router.engine import Engine
from router.transport.base import AttentionLink, ExpertLink

Found = tuple[Sources, Sequence[str]]
"""Where workers are looked for, and those the engine has been made with."""


class Membership:
    """Follows both lists of workers for one engine."""

    def __init__(
        self,
        engine: Engine,
        attention: Found | None,
        experts: Found,
        attention_link: Callable[[str], AttentionLink] | None,
        expert_link: Callable[[str], ExpertLink],
    ) -> None:
        """attention: None where it is in this process. The last two: how one at an address is reached."""
        self._engine, self._attention_link, self._expert_link = engine, attention_link, expert_link
        self._watches = [Discovery(*experts, self._follow_experts)]
        if attention is not None:
            self._watches.append(Discovery(*attention, self._follow_attention))

    def start(self) -> None:
        """Begins to look, where anything can change."""
        for watch in self._watches:
            watch.start()

    def stop(self) -> None:
        """Ends it."""
        for watch in self._watches:
            watch.stop()

    def _follow_attention(self, changes: Changes) -> None:
        by_address: dict[str, AttentionCell] = {cell.link.address: cell for cell in self._engine.cells}
        for address in changes.added:
            assert self._attention_link is not None, "attention workers are elsewhere"
            self._engine.add_cell(self._attention_link(address))
        for address in changes.removed:
            if address in by_address:
                self._engine.remove_cell(by_address[address])

    def _follow_experts(self, changes: Changes) -> None:
        assert self._engine.pool is not None, "remote experts have a pool"
        self._engine.pool.follow(changes, self._expert_link)
