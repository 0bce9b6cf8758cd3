"""The live expert workers: which are ready, which one a call uses, what happens when one fails.

An expert call is stateless, so a call that fails is sent again to another holder of the same experts. When no holder
is left, the call waits for one to come back. An expert is never left out of the sum.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import torch

from grokmoe.channel import TIMEOUTS
from grokmoe.errors import ConfigError, GrokmoeError, InternalError, Reason, Unavailable
from grokmoe.model_config import ModelConfig
from router.dispatch import Shard, reassign
from router.legs import Legs
from router.placement import Placement
from router.transport.base import ExpertInfo, ExpertLink, ExpertReply
from router.worker_state import WorkerState

logger = logging.getLogger(__name__)


MAX_FAULTS = 2
"""Workers that may fail on the same rows before the rows are taken to be at fault."""


class ExpertsUnavailable(Unavailable):
    """An expert has no worker. Says nothing about the attention worker whose step met it."""

    default_reason = Reason.WORKER_UNAVAILABLE


@dataclasses.dataclass(frozen=True)
class ExpertPoolSettings:
    """Named limits, seconds."""

    replica_wait: float = 30.0
    """How long a call waits for a holder of its expert when none is ready."""
    probe_interval: float = 0.25
    """Pause between two attempts to reach a worker that is lost."""


class ExpertMember:
    """One worker of the pool: its link, its last description, its state, its load."""

    def __init__(self, index: int, link: ExpertLink) -> None:
        self.index = index
        self.link = link
        self.info: ExpertInfo | None = None
        self.state = WorkerState.JOINING
        self.rows_in_flight = 0


class ExpertPool:
    """Sends shards to workers and brings their rows back."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        links: Sequence[ExpertLink],
        preferred: Mapping[int, Sequence[int]] | None = None,
        settings: ExpertPoolSettings | None = None,
    ) -> None:
        """preferred: expert -> workers to use, see `Placement.build`."""
        self.members = [ExpertMember(index, link) for index, link in enumerate(links)]
        self.placement: Placement | None = None
        self._config, self._dtype, self._preferred = config, dtype, preferred
        self._settings = settings or ExpertPoolSettings()
        self._changed = asyncio.Event()
        self._probes: dict[int, asyncio.Task[None]] = {}

    async def connect(self, member: ExpertMember) -> None:
        """Asks one worker what it is and takes it in.

        Raises Unavailable when it cannot be reached yet, ConfigError when it serves another model.
        """
        info = await asyncio.wait_for(member.link.describe(), TIMEOUTS.connect)
        who = f"expert worker {member.index} at {member.link.address}"
        if info.config_hash != self._config.content_hash:
            raise ConfigError(
                f"{who} serves another model: config hash {info.config_hash}, expected {self._config.content_hash}"
            )
        if info.dtype != self._dtype:
            raise ConfigError(f"{who} computes in {info.dtype}, expected {self._dtype}")
        member.info, member.state = info, WorkerState.READY

    def place(self) -> None:
        """Makes the placement table from what all connected workers hold. ConfigError when an expert has no holder."""
        held = {member.index: member.info.experts for member in self.members if member.info is not None}
        config = self._config
        self.placement = Placement.build(config.num_layers, config.num_experts, held, self._preferred)

    def check_rows(self, max_step_tokens: int) -> None:
        """Raises ConfigError when a step can send a worker more rows than it takes in one call."""
        for member in self.members:
            assert member.info is not None
            num_held = len({expert for expert, _, _ in member.info.experts})
            most = max_step_tokens * min(num_held, self._config.experts_per_token)
            if member.info.max_rows < most:
                raise ConfigError(
                    f"expert worker {member.index} at {member.link.address} takes {member.info.max_rows} rows in a "
                    f"call, a step of {max_step_tokens} tokens may send it {most}: lower max_step_tokens"
                )

    async def choose(self, layer: int) -> list[int]:
        """One worker per expert for a call on `layer`; waits while an expert has no ready holder.

        Raises ExpertsUnavailable after `replica_wait` seconds.
        """
        assert self.placement is not None
        deadline = time.monotonic() + self._settings.replica_wait
        while True:
            ready = {member.index for member in self.members if member.state is WorkerState.READY}
            load = {member.index: member.rows_in_flight for member in self.members}
            chosen = self.placement.choose(layer, ready, load)
            workers = [worker for worker in chosen if worker is not None]
            if len(workers) == len(chosen):
                return workers
            missing = chosen.index(None)
            left = deadline - time.monotonic()
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), max(left, 0))
            except TimeoutError:
                raise ExpertsUnavailable(
                    f"no worker holds expert {missing} of layer {layer}; waited {self._settings.replica_wait:g} s"
                ) from None

    async def forward(
        self, lane: int, layer: int, shards: Sequence[Shard], rows_ND: torch.Tensor, legs: Legs
    ) -> torch.Tensor:
        """Sends every shard to its worker, at the same time. Returns all rows in their order.

        Raises ExpertsUnavailable when an expert has no holder left for too long.
        """
        begin = time.perf_counter()
        if len(shards) == 1:
            replies = [await self._forward_shard(lane, layer, shards[0], rows_ND)]
        else:
            replies = await _gather(
                [self._forward_shard(lane, layer, shard, rows_ND[shard.begin : shard.end]) for shard in shards]
            )
        total = time.perf_counter() - begin
        if not replies:
            return rows_ND
        # The layer waits for its slowest worker: that one's times are the legs.
        slowest = max(replies, key=lambda reply: reply.queue + reply.compute)
        legs.add("queue", slowest.queue)
        legs.add("expert", slowest.compute)
        legs.add("wire", max(0.0, total - slowest.queue - slowest.compute))
        return replies[0].rows_ND if len(replies) == 1 else torch.cat([reply.rows_ND for reply in replies])

    async def _forward_shard(
        self, lane: int, layer: int, shard: Shard, rows_ND: torch.Tensor, num_faults: int = 0
    ) -> ExpertReply:
        """num_faults: workers that have failed on these rows of themselves, and not just vanished."""
        member = self.members[shard.worker]
        if member.state is WorkerState.READY:  # it may have been lost since it was chosen
            member.rows_in_flight += rows_ND.shape[0]
            try:
                return await member.link.forward(lane, layer, shard.expert_ids, shard.counts, rows_ND)
            except Unavailable as error:
                self._suspect(member, error)
            except InternalError as error:  # such as out of memory: another holder may do better
                num_faults += 1
                if num_faults > MAX_FAULTS:
                    raise
                self._suspect(member, error)
            finally:
                member.rows_in_flight -= rows_ND.shape[0]
        parts = reassign(shard, await self.choose(layer))
        replies = await _gather(
            [
                self._forward_shard(
                    lane, layer, part, rows_ND[part.begin - shard.begin : part.end - shard.begin], num_faults
                )
                for part in parts
            ]
        )
        return ExpertReply(
            torch.cat([reply.rows_ND for reply in replies]),
            max(reply.queue for reply in replies),
            max(reply.compute for reply in replies),
        )

    def _suspect(self, member: ExpertMember, error: GrokmoeError) -> None:
        """Gives a worker no more work until it has described itself again."""
        if member.state is not WorkerState.READY:
            return
        member.state = WorkerState.SUSPECT
        logger.warning("expert worker %d at %s is suspect: %s", member.index, member.link.address, error.message)
        self._probes[member.index] = asyncio.ensure_future(self._probe(member))

    async def _probe(self, member: ExpertMember) -> None:
        while member.state is WorkerState.SUSPECT:
            await asyncio.sleep(self._settings.probe_interval)
            known = member.info
            try:
                await self.connect(member)
                self.place()  # it may hold other experts now
            except (GrokmoeError, TimeoutError) as error:
                # Another model at the same address is no passing trouble: somebody has to act.
                level = logging.WARNING if isinstance(error, ConfigError) else logging.DEBUG
                logger.log(level, "expert worker %d still away: %s", member.index, error)
                member.info, member.state = known, WorkerState.SUSPECT
                continue
            logger.info("expert worker %d at %s is back", member.index, member.link.address)
            self._changed.set()

    async def close(self) -> None:
        """Ends probes and links."""
        for probe in self._probes.values():
            probe.cancel()
        await asyncio.gather(*(member.link.close() for member in self.members))


async def _gather(calls: Sequence[Coroutine[Any, Any, ExpertReply]]) -> list[ExpertReply]:
    """Awaits all calls. When one fails the others are cancelled, unlike with asyncio.gather."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
