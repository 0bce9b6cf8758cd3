"""Rows to experts: every shard to its worker at the same time, again elsewhere when a worker fails.

An expert call is stateless, so the same rows can be sent again to any holder of the same experts, and give the same
bits. When no holder is left, the call waits for one to come back. An expert is never left out of the sum.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import torch

from grokmoe.errors import InternalError
from grokmoe.model_config import ModelConfig
from grokmoe.trace_context import new_span
from router.dispatch import Shard, reassign
from router.experts.answers import RowsWithoutAnswer, is_finite
from router.experts.attempt import AttemptFailed, Attempts
from router.experts.call_record import CallRecord, LayerHook
from router.experts.counters import Cause
from router.experts.hedging import hedge_after, hedged, second_holder
from router.experts.member import ExpertMember
from router.experts.members import ExpertMembers, ExpertsUnavailable
from router.experts.moves import Moves
from router.experts.rebalancer import Rebalancer
from router.experts.settings import ExpertPoolSettings
from router.legs import Legs
from router.transport.base import ExpertLink, ExpertReply

MAX_FAULTS = 2
"""Workers that may fail on the same rows before the rows are taken to be at fault."""

MAX_CORRUPT = 1
"""Answers that may be none. If the numbers of the next one are none, too, the two are taken together, row by row: rows
that are finite in neither have no finite answer."""

MAX_ATTEMPTS = 8
"""How often the same rows are sent, once the time to wait for a holder is over: workers that answer probes and fail
calls would keep them for ever."""


@dataclasses.dataclass(frozen=True)
class _Past:
    """What has become of some rows so far: how often they were sent, and when the first worker failed on them.

    unsure_ND: an answer of which some rows are not finite.
    """

    num_attempts: int = 0
    num_faults: int = 0
    num_corrupt: int = 0
    failed_at: float | None = None
    unsure_ND: torch.Tensor | None = None

    def of(self, begin: int, end: int) -> _Past:
        """The same of some of the rows."""
        return self if self.unsure_ND is None else dataclasses.replace(self, unsure_ND=self.unsure_ND[begin:end])

    def after(self, failed: AttemptFailed) -> _Past:
        """One more failure. Raises the worker's error when the rows seem to be at fault."""
        past = dataclasses.replace(
            self,
            num_attempts=self.num_attempts + 1,
            num_faults=self.num_faults + (failed.cause is Cause.INTERNAL),
            num_corrupt=self.num_corrupt + (failed.cause is Cause.CORRUPT),
            failed_at=self.failed_at or time.monotonic(),
            unsure_ND=self.unsure_ND if failed.unsure_ND is None else failed.unsure_ND,
        )
        if past.num_faults > MAX_FAULTS:
            raise failed.error
        if past.num_corrupt > MAX_CORRUPT:
            raise InternalError(f"{past.num_corrupt} expert workers agree on an answer that cannot be: {failed.error}")
        return past


@dataclasses.dataclass
class _Round:
    """One call of `forward`: where its rows go, until when they matter, whether any of them have no answer, and who was
    called, in the order in which that ended."""

    lane: int
    layer: int
    until: float
    is_incomplete: bool = False
    calls: list[CallRecord] = dataclasses.field(default_factory=list)


class ExpertPool(ExpertMembers):
    """Sends shards to workers and brings their rows back."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        links: Sequence[ExpertLink],
        preferred: Mapping[int, Sequence[int]] | None = None,
        settings: ExpertPoolSettings | None = None,
    ) -> None:
        """See ExpertMembers."""
        super().__init__(config, dtype, links, preferred, settings)
        self._attempts = Attempts(self)
        self.moves = Moves(self)
        self.rebalancer = Rebalancer(self, self.moves)
        self.on_layer: list[LayerHook] = []

    async def close(self) -> None:
        """Ends moves, probes and links."""
        await self.rebalancer.close()
        await self.moves.close()
        await super().close()

    async def forward(
        self,
        lane: int,
        layer: int,
        shards: Sequence[Shard],
        rows_ND: torch.Tensor,
        legs: Legs,
        deadline: float | None = None,
    ) -> torch.Tensor:
        """Sends every shard to its worker, at the same time. Returns all rows in their order.

        shards: may name NOBODY; such a shard waits for a holder, the others do not.
        deadline: when the step's time is over, monotonic; None: it has no end.
        Raises ExpertsUnavailable when an expert has no holder left for too long, InternalError when the rows have no
        answer: RowsWithoutAnswer, with the answers to the others, when only some have no finite one.
        """
        begin = time.perf_counter()
        this = _Round(lane, layer, float("inf") if deadline is None else deadline)
        if len(shards) == 1:
            replies = [await self._shard(this, shards[0], rows_ND, _Past())]
        else:
            replies = await _gather(
                [self._shard(this, shard, rows_ND[shard.begin : shard.end], _Past()) for shard in shards]
            )
        total = time.perf_counter() - begin
        if not replies:
            return rows_ND
        for hook in self.on_layer:
            hook(layer, this.calls)
        # The layer waits for its slowest worker: that one's times are the legs.
        slowest = max(replies, key=lambda reply: reply.queue + reply.compute)
        legs.add("queue", slowest.queue)
        legs.add("expert", slowest.compute)
        legs.add("wire", max(0.0, total - slowest.queue - slowest.compute))
        out_ND = replies[0].rows_ND if len(replies) == 1 else torch.cat([reply.rows_ND for reply in replies])
        if this.is_incomplete:
            raise RowsWithoutAnswer(out_ND)
        return out_ND

    async def _shard(self, this: _Round, shard: Shard, rows_ND: torch.Tensor, past: _Past) -> ExpertReply:
        begin = time.monotonic()
        while True:
            member = self.find(shard.worker)
            if member is not None and member.is_usable:  # it may have been lost since it was chosen
                if past.failed_at is not None:
                    self._check_patience(past)
                called, span_id = time.monotonic(), new_span()
                try:
                    reply = await self._call(this, member, shard, rows_ND, past)
                except AttemptFailed as failed:
                    this.calls.append(_record(member, rows_ND, called, span_id, failed.cause.value))
                    past = past.after(failed)
                    self.counters.retries[failed.cause] += 1
                else:
                    this.calls.append(_record(member, rows_ND, called, span_id, reply=reply))
                    # Rows that were not finite when they were sent are never unsure.
                    this.is_incomplete |= past.unsure_ND is not None and not is_finite(reply.rows_ND)
                    return reply
            waiting_since = begin if past.failed_at is None else past.failed_at
            give_up_at = min(this.until, waiting_since + self.settings.replica_wait)
            workers = await self.wait_for(this.layer, shard.expert_ids, give_up_at)
            parts = reassign(shard, workers)
            if len(parts) > 1:
                break
            shard = parts[0]
        cuts = [(part, part.begin - shard.begin, part.end - shard.begin) for part in parts]
        replies = await _gather(
            [self._shard(this, part, rows_ND[begin:end], past.of(begin, end)) for part, begin, end in cuts]
        )
        return ExpertReply(
            torch.cat([reply.rows_ND for reply in replies]),
            max(reply.queue for reply in replies),
            max(reply.compute for reply in replies),
        )

    def _check_patience(self, past: _Past) -> None:
        assert past.failed_at is not None
        waited = time.monotonic() - past.failed_at
        if past.num_attempts >= MAX_ATTEMPTS and waited > self.settings.replica_wait:
            raise ExpertsUnavailable(f"{past.num_attempts} calls have failed in {waited:.1f} s")

    async def _call(
        self, this: _Round, member: ExpertMember, shard: Shard, rows_ND: torch.Tensor, past: _Past
    ) -> ExpertReply:
        layer = this.layer

        def call(member: ExpertMember) -> Coroutine[Any, Any, ExpertReply]:
            return self._attempts.call(
                member, this.lane, layer, shard, rows_ND, past.num_attempts, this.until, past.unsure_ND
            )

        seconds = hedge_after(member.latency, member.load + rows_ND.shape[0], self.counters, self.settings)
        if seconds is None:
            return await call(member)
        return await hedged(call, member, lambda: second_holder(self, layer, shard, member), seconds, self.counters)


def _record(
    member: ExpertMember,
    rows_ND: torch.Tensor,
    begin: float,
    span_id: int,
    failure: str = "",
    reply: ExpertReply | None = None,
) -> CallRecord:
    """A call that has just ended. One that was hedged stands for both."""
    now, address, num_rows = time.monotonic(), member.link.address, rows_ND.shape[0]
    told = (0.0, 0.0, 0) if reply is None else (reply.queue, reply.compute, reply.batch_rows)
    return CallRecord(member.index, address, num_rows, begin, now, *told, failure, span_id)


async def _gather(calls: Sequence[Coroutine[Any, Any, ExpertReply]]) -> list[ExpertReply]:
    """Awaits all calls. When one fails the others are cancelled, unlike with asyncio.gather."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
