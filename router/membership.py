"""Workers come and go: what discovery finds becomes cells of the engine and members of its expert pool."""

from __future__ import annotations

from collections.abc import Sequence

from router.cell import AttentionCell
from router.discovery import Changes, Discovery, Sources
from router.engine import Engine
from router.transport.grpc_attention import GrpcAttentionLink
from router.transport.grpc_expert import GrpcExpertLink
from router.transport.worker_access import WorkerAccess


class Membership:
    """Follows both lists of workers for one engine."""

    def __init__(
        self,
        engine: Engine,
        access: WorkerAccess,
        attention: tuple[Sources, Sequence[str]],
        experts: tuple[Sources, Sequence[str]],
    ) -> None:
        """attention, experts: where workers are looked for, and those the engine has been made with."""
        self._engine, self._access = engine, access
        self._watches = [Discovery(*attention, self._follow_attention), Discovery(*experts, self._follow_experts)]

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
            self._engine.add_cell(GrpcAttentionLink(address, access=self._access))
        for address in changes.removed:
            if address in by_address:
                self._engine.remove_cell(by_address[address])

    def _follow_experts(self, changes: Changes) -> None:
        assert self._engine.pool is not None, "remote experts have a pool"
        self._engine.pool.follow(changes, lambda address: GrpcExpertLink(address, self._access))
