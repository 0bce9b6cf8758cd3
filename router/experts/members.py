"""Who is in the pool: joining, leaving, losing and coming back, and the table of who holds what."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from grokmoe.channel import TIMEOUTS
from grokmoe.errors import ConfigError, FailedPrecondition, Reason, Unavailable
from grokmoe.expert_units import describe_unit, expert_of
from grokmoe.model_config import ModelConfig
from router.discovery import Changes
from router.experts.counters import ExpertCounters
from router.experts.fitness import check_alike, check_fits, check_rows
from router.experts.member import ExpertMember
from router.experts.settings import ExpertPoolSettings
from router.placement import NOBODY, Choice, Pair, Placement, ranges_of
from router.probing import Prober
from router.transport.base import ExpertInfo, ExpertLink
from router.worker_state import WorkerEvent, WorkerState

logger = logging.getLogger(__name__)


class ExpertsUnavailable(Unavailable):
    """An expert has no worker. Says nothing about the attention worker whose step met it."""

    default_reason = Reason.WORKER_UNAVAILABLE


class SlicingChanged(Exception):
    """An expert is used in another number of slices than rows were sent for: they have to be sent anew."""


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
        """preferred: unit -> workers to use, see `Placement.build`."""
        self.settings = settings or ExpertPoolSettings()
        self.counters = ExpertCounters()
        self.members: list[ExpertMember] = []
        self.placement: Placement | None = None
        self.placement_version = 0
        self.on_change: list[Callable[[], None]] = []
        self.config = config
        self._dtype, self._preferred = dtype, dict(preferred or {})
        self._by_index: dict[int, ExpertMember] = {}
        self._num_ever = 0
        self._max_step_tokens = 0
        self._changed = asyncio.Event()
        self._random = random.Random(0)
        self._turns = [0] * config.num_layers
        self._leaving: set[asyncio.Task[None]] = set()
        self._asking: dict[ExpertMember, asyncio.Task[None]] = {}
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
        link.watch(lambda why: self.lose(member, WorkerEvent.FAILED, why))
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
        self._check_fits(member, info)
        if info.is_draining:
            member.note(WorkerEvent.DRAINS)
            raise Unavailable(f"{member.name} is about to end", reason=Reason.SHUTTING_DOWN)
        member.adopt(info)

    def _check_fits(self, member: ExpertMember, info: ExpertInfo) -> None:
        """Raises ConfigError when what the worker says does not fit the model, or those that are in use."""
        check_fits(self.config, self._dtype, self._max_step_tokens, member.name, info)
        others = {each.name: each.info for each in self.members if each is not member and each.is_usable and each.info}
        check_alike(member.name, info, others)

    def check_rows(self, max_step_tokens: int) -> None:
        """Raises ConfigError when a step can send a worker more rows than it takes in one call. Who joins later is
        held to the same."""
        self._max_step_tokens = max_step_tokens
        for member in self.members:
            if member.info is not None:
                check_rows(self.config, max_step_tokens, member.name, member.info)

    def check_can_hold(self, member: ExpertMember, pairs: Collection[Pair]) -> None:
        """Raises FailedPrecondition when a step could send it more rows than it takes, if it held these."""
        assert member.info is not None
        try:
            info = dataclasses.replace(member.info, experts=ranges_of(pairs))
            check_rows(self.config, self._max_step_tokens, member.name, info)
        except ConfigError as error:
            raise FailedPrecondition(error.message) from error

    def place(self) -> None:
        """Makes the table from what all connected workers hold. ConfigError when an expert, or a slice of one, has no
        holder."""
        self._place(is_strict=True)

    def _place(self, is_strict: bool = False) -> None:
        held = {member.index: member.held for member in self.members if member.info and not member.is_removed}
        config, ready = self.config, None if is_strict else self._usable()
        placement = Placement.build(config.num_layers, config.num_experts, held, self._preferred, ready)
        if placement != self.placement:
            self.placement = placement
            self.placement_version += 1

    def _usable(self) -> set[int]:
        return {member.index for member in self.members if member.is_usable}

    def place_anew(self) -> None:
        """Makes the table again after something about a member has changed, and tells everyone."""
        if self.placement is not None:
            self._place()
        self._tell()

    @property
    def has_preferences(self) -> bool:
        """Whether a table from outside says who is used."""
        return bool(self._preferred)

    def forget_preferences(self, experts: Collection[int]) -> None:
        """A newer word than the table from outside has come for these experts: from now on every holder is used."""
        for unit in [unit for unit in self._preferred if expert_of(unit) in experts]:
            del self._preferred[unit]

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
        task = asyncio.ensure_future(self._retire(member))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        self.place_anew()

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
        if self.placement is not None and any(self.placement.slicings):
            self._place()  # what it was needed for may be used in another number of slices
        self._tell()

    def _back(self, member: ExpertMember) -> None:
        self.place_anew()  # it may hold other experts now

    async def describe_again(self, member: ExpertMember) -> None:
        """Asks a worker in use what it holds by now, and makes the table anew.

        Raises Unavailable when it does not answer or is not in use any more, ConfigError when it does not fit any more.
        """
        try:
            info = await asyncio.wait_for(member.link.describe(), TIMEOUTS.connect)
        except TimeoutError:
            raise Unavailable(f"{member.name} does not say what it holds") from None
        self._check_fits(member, info)
        if info.is_draining:
            self.lose(member, WorkerEvent.DRAINS, "it is about to end")
        if not member.is_usable:  # its prober describes it
            raise Unavailable(f"{member.name} is {member.state.value}", reason=Reason.WORKER_UNAVAILABLE)
        known = member.info
        if known is None or known.incarnation != info.incarnation or known.revision <= info.revision:
            member.adopt(info)
        self.place_anew()

    def note_revision(self, member: ExpertMember, revision: int) -> None:
        """An answer says which revision of its experts the worker has; a newer one than ours is asked for."""
        if member.info is not None and revision > member.info.revision:
            self._ask_again(member)

    def note_missing(self, member: ExpertMember, layer: int, expert_ids: Sequence[int]) -> None:
        """A worker has given up one of these experts, and nobody knows which. It stays in use for what else it holds.

        Those that somebody else holds go there until it is described again; if that is none of them, all have to wait
        until everybody is described again: the table is wrong about who holds the one that is missing.
        """
        assert self.placement is not None
        others = self._usable() - {member.index}
        elsewhere = [each for each in expert_ids if self.placement.can_serve(layer, each, others)]
        member.missing.update((layer, expert) for expert in elsewhere or expert_ids)
        for each in [member] if elsewhere else [each for each in self.members if each.is_usable]:
            self._ask_again(each)
        self.place_anew()

    def _ask_again(self, member: ExpertMember) -> None:
        """In the background, once at a time."""
        if member in self._asking:
            return

        async def ask() -> None:
            try:
                await self.describe_again(member)
            except (Unavailable, ConfigError) as error:
                # Nobody knows what it holds: only its prober can bring it back.
                self.lose(member, WorkerEvent.FAILED, f"it does not say what it holds: {error}")
            finally:
                del self._asking[member]

        self._asking[member] = asyncio.ensure_future(ask())

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

    def choose(self, layer: int, without: Collection[int] = ()) -> Choice:
        """One ready worker per expert, or per slice, for a call on `layer`, NOBODY where there is none.

        without: workers not to use.
        """
        assert self.placement is not None
        load = {member.index: member.load for member in self.members if member.is_usable}
        for index in without:
            load.pop(index, None)
        self._turns[layer] += 1
        return self.placement.choose(layer, load, self._random.random, self._turns[layer] - 1)

    def has_holders(self, layer: int, expert_ids: Sequence[int], without: Collection[int]) -> bool:
        """Whether somebody else than `without` is ready to compute each of these experts."""
        assert self.placement is not None
        others = self._usable().difference(without)
        return all(self.placement.can_serve(layer, each, others) for each in expert_ids)

    async def wait_for(self, layer: int, expert_ids: Sequence[int], until: float) -> Choice:
        """Like `choose`, when each of `expert_ids` has a worker.

        Raises ExpertsUnavailable at `until` (monotonic), SlicingChanged when one of them is not used any more.
        """
        begin = time.monotonic()
        while True:
            chosen = self.choose(layer)
            if not chosen.keys() >= set(expert_ids):
                raise SlicingChanged
            missing = [each for each in expert_ids if chosen[each] == NOBODY]
            if not missing:
                return chosen
            try:
                await self._change(max(until - time.monotonic(), 0))
            except TimeoutError:
                unit, waited = describe_unit(missing[0]), time.monotonic() - begin
                raise ExpertsUnavailable(
                    f"no worker holds expert {unit} of layer {layer}; waited {waited:.1f} s"
                ) from None

    async def close(self) -> None:
        """Ends probes and links."""
        for member in self.members:
            if member.prober is not None:
                member.prober.stop()
        tasks = [*self._leaving, *self._asking.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(member.link.close() for member in self.members))
