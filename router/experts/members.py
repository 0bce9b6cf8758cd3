"""Who is in the pool: joining, leaving, losing and coming back, and the table of who holds what."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from grokmoe.channel import TIMEOUTS
from grokmoe.errors import Reason, Unavailable
from grokmoe.model_config import ModelConfig
from router.discovery import Changes
from router.experts.counters import ExpertCounters
from router.experts.fitness import check_fits, check_rows
from router.experts.member import ExpertMember
from router.experts.settings import ExpertPoolSettings
from router.placement import NOBODY, Placement
from router.probing import Prober
from router.transport.base import ExpertLink
from router.worker_state import WorkerEvent, WorkerState

logger = logging.getLogger(__name__)


class ExpertsUnavailable(Unavailable):
    """An expert has no worker. Says nothing about the attention worker whose step met it."""

    default_reason = Reason.WORKER_UNAVAILABLE


class ExpertMembers:
    """The members and their placement. Those that are lost are probed until they are back or removed."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        links: Sequence[ExpertLink],
        preferred: Mapping[int, Sequence[int]] | None = None,
        settings: ExpertPoolSettings | None = None,
    ) -> None:
        """preferred: expert -> workers to use, see `Placement.build`."""
        self.settings = settings or ExpertPoolSettings()
        self.counters = ExpertCounters()
        self.members: list[ExpertMember] = []
        self.placement: Placement | None = None
        self.on_change: list[Callable[[], None]] = []
        self._config, self._dtype, self._preferred = config, dtype, preferred
        self._by_index: dict[int, ExpertMember] = {}
        self._num_ever = 0
        self._max_step_tokens = 0
        self._changed = asyncio.Event()
        self._random = random.Random(0)
        self._leaving: set[asyncio.Task[None]] = set()
        for link in links:
            self._enlist(link)

    def _enlist(self, link: ExpertLink) -> ExpertMember:
        member = ExpertMember(self._num_ever, link)
        self._num_ever += 1
        self.members.append(member)
        self._by_index[member.index] = member
        member.prober = Prober(
            lambda: self.connect(member),
            self.settings.probe,
            lambda: self._back(member),
            member.name,
            lambda: member.note(WorkerEvent.AWAY),
        )
        return member

    async def connect(self, member: ExpertMember) -> None:
        """Asks one worker what it is and takes it in.

        Raises Unavailable when it cannot be reached yet or is about to end, ConfigError when it does not fit.
        """
        try:
            info = await asyncio.wait_for(member.link.describe(), TIMEOUTS.connect)
        except (Unavailable, TimeoutError):
            member.note(WorkerEvent.FAILED)
            raise
        check_fits(self._config, self._dtype, self._max_step_tokens, member.name, info)
        if info.is_draining:
            member.note(WorkerEvent.DRAINS)
            raise Unavailable(f"{member.name} is about to end", reason=Reason.SHUTTING_DOWN)
        member.adopt(info)

    def check_rows(self, max_step_tokens: int) -> None:
        """Raises ConfigError when a step can send a worker more rows than it takes in one call. Who joins later is
        held to the same."""
        self._max_step_tokens = max_step_tokens
        for member in self.members:
            if member.info is not None:
                check_rows(self._config, max_step_tokens, member.name, member.info)

    def place(self) -> None:
        """Makes the table from what all connected workers hold. ConfigError when an expert has no holder."""
        self._place(is_strict=True)

    def _place(self, is_strict: bool = False) -> None:
        held = {member.index: member.info.experts for member in self.members if member.info and not member.is_removed}
        config = self._config
        self.placement = Placement.build(config.num_layers, config.num_experts, held, self._preferred, is_strict)

    def add(self, link: ExpertLink) -> ExpertMember:
        """A worker more, used as soon as it has described itself and fits."""
        member = self._enlist(link)
        assert member.prober is not None
        member.prober.start()
        return member

    def remove(self, member: ExpertMember) -> None:
        """Gives a worker no more work; when its calls are answered it is forgotten."""
        if member.is_removed:
            return
        member.is_removed = True
        member.note(WorkerEvent.DRAINS)
        if member.prober is not None:
            member.prober.stop()
        if self.placement is not None:
            self._place()
        task = asyncio.ensure_future(self._retire(member))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        self._tell()

    def follow(self, change: Changes, make_link: Callable[[str], ExpertLink]) -> None:
        """Does what a discovery has found: adds and removes workers by address."""
        for address in change.removed:
            for member in [each for each in self.members if each.link.address == address]:
                self.remove(member)
        for address in change.added:
            self.add(make_link(address))

    async def _retire(self, member: ExpertMember) -> None:
        while member.calls_in_flight:
            await self._change()
        self.members.remove(member)
        del self._by_index[member.index]
        await member.link.close()
        logger.info("%s has left", member.name)

    def lose(self, member: ExpertMember, event: WorkerEvent, why: str) -> None:
        """A call has shown that a worker cannot be used. It gets no more work until it has described itself again."""
        if member.state is not WorkerState.READY:
            return
        member.note(event)
        self.counters.failovers += 1
        logger.warning("%s is %s: %s", member.name, member.state.value, why)
        assert member.prober is not None
        member.prober.start()
        self._tell()

    def _back(self, member: ExpertMember) -> None:
        if self.placement is not None:
            self._place()  # it may hold other experts now
        self._tell()

    def note_idle(self, member: ExpertMember) -> None:
        """The last call of a worker is over."""
        if member.is_removed:
            self._tell()

    def _tell(self) -> None:
        self._changed.set()
        for call in self.on_change:
            call()

    async def _change(self, timeout: float | None = None) -> None:
        self._changed.clear()
        await asyncio.wait_for(self._changed.wait(), timeout)

    def find(self, index: int) -> ExpertMember | None:
        """The member of that index; None for NOBODY and for one that has left."""
        return self._by_index.get(index)

    def choose(self, layer: int, without: Collection[int] = ()) -> list[int]:
        """One ready worker per expert for a call on `layer`, NOBODY where there is none.

        without: workers not to use.
        """
        assert self.placement is not None
        load = {member.index: member.load for member in self.members if member.is_usable}
        for index in without:
            load.pop(index, None)
        return self.placement.choose(layer, load, self._random.random)

    def has_holders(self, layer: int, expert_ids: Sequence[int], without: Collection[int]) -> bool:
        """Whether somebody else than `without` is ready to compute each of these experts."""
        chosen = self.choose(layer, without)
        return all(chosen[expert] != NOBODY for expert in expert_ids)

    async def wait_for(self, layer: int, expert_ids: Sequence[int], until: float) -> list[int]:
        """Like `choose`, when each of `expert_ids` has a worker. Raises ExpertsUnavailable at `until` (monotonic)."""
        begin = time.monotonic()
        while True:
            chosen = self.choose(layer)
            missing = [expert for expert in expert_ids if chosen[expert] == NOBODY]
            if not missing:
                return chosen
            try:
                await self._change(max(until - time.monotonic(), 0))
            except TimeoutError:
                raise ExpertsUnavailable(
                    f"no worker holds expert {missing[0]} of layer {layer}; waited {time.monotonic() - begin:.1f} s"
                ) from None

    async def close(self) -> None:
        """Ends probes and links."""
        for member in self.members:
            if member.prober is not None:
                member.prober.stop()
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await asyncio.gather(*(member.link.close() for member in self.members))
