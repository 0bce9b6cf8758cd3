"""Expert workers that load and give up experts, refuse rows for what they have not, and can be held at every step."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable, Sequence

import torch

from grokmoe.errors import FailedPrecondition, Reason, ResourceExhausted, Unavailable
from router.placement import ExpertLayers, Pair, pairs_of, ranges_of
from router.transport.base import ExpertInfo, ExpertReply, Loaded
from tests.router.tiny import ExpertDouble

PAIR_BYTES = 1000


class MovableExpert(ExpertDouble):
    """`told`: what it was asked to load and unload, in order. Lingering: what is unloaded is refused at once.

    may_load, may_describe, may_answer: clear one and the worker hangs there.
    """

    def __init__(self, held: Iterable[int] = range(8), address: str = "", capacity: int = 0) -> None:
        super().__init__(held)
        # The team of a new thread has as many as there are cores, and those of several doubles fight for them.
        self._device.call(torch.set_num_threads, 1)
        self.address = address or self.address
        self.info = dataclasses.replace(self.info, revision=1, expert_bytes=PAIR_BYTES, capacity=capacity)
        self.told: list[tuple[str, set[Pair]]] = []
        self.refused: list[tuple[int, tuple[int, ...]]] = []
        self.may_load, self.may_describe, self.may_answer = asyncio.Event(), asyncio.Event(), asyncio.Event()
        for gate in (self.may_load, self.may_describe, self.may_answer):
            gate.set()

    @property
    def pairs(self) -> set[Pair]:
        return pairs_of(self.info.experts)

    def hold(self, pairs: Iterable[Pair]) -> None:
        """As if another router had moved something."""
        self.info = dataclasses.replace(self.info, experts=ranges_of(pairs), revision=self.info.revision + 1)

    async def describe(self) -> ExpertInfo:
        info = await super().describe()
        await self.may_describe.wait()
        return info

    async def load(self, config_hash: str, experts: Sequence[ExpertLayers], timeout: float) -> Loaded:
        new = pairs_of(experts) - self.pairs
        self.told.append(("load", pairs_of(experts)))
        if self.info.capacity and len(self.pairs | new) > self.info.capacity:
            raise ResourceExhausted("full", reason=Reason.NO_ROOM)
        await self.may_load.wait()
        if not self.is_up:
            raise Unavailable("died while loading")
        self.hold(self.pairs | new)
        return Loaded(len(new) * PAIR_BYTES, 0.001)

    async def unload(self, config_hash: str, experts: Sequence[ExpertLayers]) -> None:
        self.told.append(("unload", pairs_of(experts)))
        if not self.is_up:
            raise Unavailable("away")
        self.hold(self.pairs - pairs_of(experts))

    async def forward(
        self,
        lane: int,
        layer: int,
        expert_ids: tuple[int, ...],
        counts: tuple[int, ...],
        rows_ND: torch.Tensor,
        timeout: float | None = None,
    ) -> ExpertReply:
        if not {(layer, expert) for expert in expert_ids} <= self.pairs:
            self.refused.append((layer, expert_ids))
            raise FailedPrecondition("given up", reason=Reason.EXPERT_NOT_HELD)
        reply = await super().forward(lane, layer, expert_ids, counts, rows_ND, timeout)
        await self.may_answer.wait()
        return dataclasses.replace(reply, revision=self.info.revision, batch_rows=rows_ND.shape[0])
