"""Experts from one worker to another while they are in use.

    copy, move                                               drop
        v                                                     |
     LOADING ---failed---> given back: nothing has changed    |
        |                                                     |
        | described again: the table has both holders         |
        v                                                     |
     (copy: done)                                             |
        |                                                     |
        +-------------------- switch <------------------------+
                                |  the old holder is out of the table; refused where it is the last one
                                v
                            DRAINING ---old holder lost, or gone---> done
                                |
                                | the calls it had are answered: it unloads and is described again
                                v
                              done

The switch is one change of the table, between two calls: nothing waits for it. Rows that were given the old holder
before and reach it after are still answered, because a worker keeps what it has given up for a while; and if it does
not, it refuses them, and they go to the new holder.

A worker takes part in one move at a time. A caller that goes away leaves its move to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import logging
import time
from collections.abc import AsyncIterator, Sequence

from grokmoe.errors import (
    FailedPrecondition,
    GrokmoeError,
    InternalError,
    InvalidRequest,
    NotFound,
    Reason,
    Unavailable,
)
from grokmoe.expert_spec import describe_ranges, describe_units
from grokmoe.expert_units import describe_unit, expert_of, num_slices_of, slicing_fault
from router.experts.member import ExpertMember
from router.experts.members import ExpertMembers
from router.placement import ExpertLayers, Pair, is_held, pairs_of, ranges_of
from router.transport.base import Loaded

logger = logging.getLogger(__name__)

UNLOAD_PAUSE = 0.2
"""Seconds between two attempts to have an old holder unload while it is away."""


class Phase(enum.StrEnum):
    """See the drawing. WAITING: one of its workers takes part in another move."""

    WAITING = ""
    LOADING = "loading"
    DRAINING = "draining"


@dataclasses.dataclass(eq=False)
class Move:
    """What goes from where to where; None: nobody gives it up, or nobody takes it."""

    experts: tuple[ExpertLayers, ...]
    source: ExpertMember | None
    target: ExpertMember | None
    phase: Phase = Phase.WAITING


@dataclasses.dataclass(frozen=True)
class MoveCost:
    """Bytes and seconds; `drain_seconds` is from the switch until the old holder had answered."""

    loaded_bytes: int = 0
    load_seconds: float = 0.0
    drain_seconds: float = 0.0


class Moves:
    """Makes moves. `under_way` has those that are not over, in the order in which they were asked for."""

    def __init__(self, members: ExpertMembers) -> None:
        self.under_way: list[Move] = []
        self.loaded = Loaded(0, 0.0)
        """Of all loads since start: what loading costs here."""
        self._members = members
        self._locks: dict[int, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[MoveCost]] = set()

    async def make(self, experts: Sequence[ExpertLayers], source: str, target: str) -> MoveCost:
        """Moves, copies (no source) or drops (no target) experts between workers, by address.

        experts: ranges of units; (unit, 0, 0) means all layers. An expert may be held whole and in slices for as long
        as it takes to get from one to the other (router/placement/slicing.py).
        Raises InvalidRequest for ranges that are not in the model or not on the source, NotFound for a worker that is
        none, FailedPrecondition with LAST_HOLDER, Unavailable when a worker is not in use or is lost, and what the
        target refuses with, such as NO_ROOM. After an error nothing has changed.
        """
        move = self._check(experts, source, target)
        self.under_way.append(move)
        task = asyncio.ensure_future(self._make(move))
        self._tasks.add(task)
        task.add_done_callback(self._over)
        return await asyncio.shield(task)

    def _over(self, task: asyncio.Task[MoveCost]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have gone away

    async def close(self) -> None:
        """Abandons what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _check(self, experts: Sequence[ExpertLayers], source: str, target: str) -> Move:
        config = self._members.config
        if not experts:
            raise InvalidRequest("experts", "is empty")
        if not source and not target:
            raise InvalidRequest("to", "is empty, and so is from: name who takes the experts, or who gives them up")
        if source == target:
            raise InvalidRequest("to", f"is {target}, the worker that gives them up")
        ranges = []
        for index, (unit, begin, end) in enumerate(experts):
            expert = expert_of(unit)
            if not 0 <= expert < config.num_experts:
                limit = config.num_experts - 1
                raise InvalidRequest(f"experts[{index}].expert", f"is {expert}, must be from 0 to {limit}")
            end = end or config.num_layers
            if not begin < end <= config.num_layers:
                limit = config.num_layers
                raise InvalidRequest(
                    f"experts[{index}].layer_end", f"is {end} for layers from {begin} on; there are {limit} layers"
                )
            if fault := slicing_fault(num_slices_of(unit), config.intermediate_size):
                raise InvalidRequest(f"experts[{index}].num_slices", fault)
            ranges.append((unit, begin, end))
        giver, taker = self._find(source), self._find(target)
        for index, each in enumerate(ranges):
            if giver is not None and not pairs_of([each]) <= pairs_of(giver.held):
                unit, begin, end = each
                where = f"in all layers from {begin} to {end - 1}"
                parts = {other for other, _, _ in giver.held if expert_of(other) == expert_of(unit)} - {unit}
                hint = f"; it holds {describe_units(parts)}" if parts else ""
                raise InvalidRequest(
                    f"experts[{index}]", f"{giver.name} does not hold expert {describe_unit(unit)} {where}{hint}"
                )
        return Move(tuple(ranges), giver, taker)

    def _find(self, address: str) -> ExpertMember | None:
        if not address:
            return None
        for member in self._members.members:
            if member.link.address == address and not member.is_removed:
                return member
        raise NotFound(f"no expert worker at {address}")

    @contextlib.asynccontextmanager
    async def _alone(self, move: Move) -> AsyncIterator[None]:
        """Waits for the other moves of its workers. In one order everywhere, so that no two wait for each other."""
        workers = sorted(member.index for member in (move.source, move.target) if member is not None)
        async with contextlib.AsyncExitStack() as stack:
            for index in workers:
                await stack.enter_async_context(self._locks.setdefault(index, asyncio.Lock()))
            yield

    async def _make(self, move: Move) -> MoveCost:
        pairs, cost = pairs_of(move.experts), MoveCost()
        try:
            async with self._alone(move):
                if move.target is not None:
                    cost = await self._copy(move, move.target, pairs)
                elif move.source is not None:
                    self._check_others(move.source, pairs)
                    self._withdraw(move.source, pairs)
                if move.source is not None:
                    seconds = await self._drain(move, move.source, pairs)
                    cost = dataclasses.replace(cost, drain_seconds=seconds)
            return cost
        finally:
            self.under_way.remove(move)

    async def _copy(self, move: Move, target: ExpertMember, pairs: set[Pair]) -> MoveCost:
        """Loads; and at the end, without a pause in between, switches if there is an old holder."""
        members, begin = self._members, time.monotonic()
        if not target.is_usable or target.info is None:
            raise Unavailable(f"{target.name} is {target.state.value}", reason=Reason.WORKER_UNAVAILABLE)
        move.phase = Phase.LOADING
        before = pairs_of(target.info.experts)
        members.check_can_hold(target, before | pairs)
        try:
            loaded = await target.link.load(
                members.config.content_hash, ranges_of(pairs), members.settings.load_timeout
            )
            await members.describe_again(target)
            if not pairs <= pairs_of(target.held):
                raise InternalError(f"{target.name} has loaded experts and does not hold them")
            if move.source is not None:
                self._check_others(move.source, pairs)
        except Exception as error:
            logger.warning("experts %s were not moved to %s: %r", describe_ranges(move.experts), target.name, error)
            await self._give_back(target, pairs - before)
            raise
        members.forget_preferences({expert_of(unit) for _, unit in pairs})
        if move.source is not None:
            self._withdraw(move.source, pairs)
        else:
            members.place_anew()
        self.loaded = Loaded(self.loaded.num_bytes + loaded.num_bytes, self.loaded.seconds + loaded.seconds)
        return MoveCost(loaded.num_bytes, time.monotonic() - begin)

    async def _give_back(self, target: ExpertMember, pairs: set[Pair]) -> None:
        """Undoes a load as far as the worker can be reached; a load that was given up has loaded nothing."""
        if not pairs:
            return
        target.withdrawn |= pairs
        try:
            await target.link.unload(self._members.config.content_hash, ranges_of(pairs))
            await self._members.describe_again(target)
        except GrokmoeError as error:
            # It holds nothing more, or it is one holder more than was asked for. Both are no harm.
            logger.warning("%s was not told to give experts back: %s", target.name, error)
        finally:
            target.withdrawn -= pairs
            self._members.place_anew()

    def _check_others(self, source: ExpertMember, pairs: set[Pair]) -> None:
        """Raises FailedPrecondition when a worker is the last ready holder of one of the experts, and no ready workers
        hold the expert otherwise cut."""
        left: set[Pair] = pairs_of(source.held) - pairs
        for member in self._members.members:
            if member is not source and member.is_usable:
                left |= pairs_of(member.held)
        alone = sorted(pair for pair in pairs - left if not is_held(left, *pair))
        if alone:
            layer, unit = alone[0]
            raise FailedPrecondition(
                f"{source.name} is the last ready holder of expert {describe_unit(unit)} in layer {layer}"
                + (f" and of {len(alone) - 1} more" if len(alone) > 1 else ""),
                reason=Reason.LAST_HOLDER,
            )

    def _withdraw(self, source: ExpertMember, pairs: set[Pair]) -> None:
        """The switch."""
        source.withdrawn |= pairs
        self._members.forget_preferences({expert_of(unit) for _, unit in pairs})
        self._members.place_anew()

    async def _drain(self, move: Move, source: ExpertMember, pairs: set[Pair]) -> float:
        """Waits for the calls that the old holder has and has it unload. Returns the seconds until they were answered.

        There is no way back and nothing to fear: a worker that stays away keeps experts that nobody sends it rows for.
        """
        move.phase, begin = Phase.DRAINING, time.monotonic()
        incarnation = source.info.incarnation if source.info else ""
        await source.drained()
        seconds = time.monotonic() - begin
        config_hash, patience = self._members.config.content_hash, self._members.settings.unload_patience
        while not source.is_removed and source.info is not None and source.info.incarnation == incarnation:
            try:
                await source.link.unload(config_hash, ranges_of(pairs))
                if source.is_usable:
                    await self._members.describe_again(source)
                break
            except GrokmoeError as error:
                if not isinstance(error, Unavailable) or time.monotonic() - begin > patience:
                    logger.warning("%s keeps experts that were moved: %s", source.name, error)
                    source.withdrawn -= pairs  # one holder more is better than one that nobody knows of
                    self._members.place_anew()
                    break
                await asyncio.sleep(UNLOAD_PAUSE)
        return seconds
