"""Rebalances the pool: measures, plans, moves; when asked, or by itself.

The plan is made by router/rebalancing, on another thread: it is pure, and the event loop has rows to send.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from grokmoe.errors import GrokmoeError
from grokmoe.expert_units import describe_unit, expert_of, num_slices_of
from router.experts.member import ExpertMember
from router.experts.members import ExpertMembers
from router.experts.moves import Moves
from router.experts.traffic import Traffic
from router.placement import ExpertLayers, pairs_of, ranges_of
from router.rebalancing import Pacing, Plan, Situation, make_plan, relative_costs

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PlannedMove:
    """Addresses; empty: nobody gives the experts up, or nobody takes them."""

    experts: tuple[ExpertLayers, ...]
    source: str
    target: str


@dataclasses.dataclass(frozen=True)
class Rebalanced:
    """What was planned and whether it was done; `reason` says why not. imbalance: as measured."""

    moves: tuple[PlannedMove, ...] = ()
    imbalance: float = 0.0
    forecast: float = 0.0
    gain_seconds: float = 0.0
    cost_seconds: float = 0.0
    done: bool = False
    reason: str = ""


class Rebalancer:
    """One per pool."""

    def __init__(self, members: ExpertMembers, moves: Moves, clock: Callable[[], float] = time.monotonic) -> None:
        self._members, self._moves, self._clock = members, moves, clock
        self.settings = members.settings.rebalance
        self.traffic = Traffic(members, self.settings)
        self._rows_LE: Sequence[Sequence[int]] | None = None
        self._pacing = Pacing(self.settings)
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, rows_LE: Sequence[Sequence[int]]) -> None:
        """Begins to measure, and to rebalance by itself if the settings say so.

        rows_LE: the book of rows of every expert since start; it is read and never copied.
        """
        self._rows_LE = rows_LE
        self._keep(asyncio.ensure_future(self._measure()))
        if self.settings.is_automatic:
            self._keep(asyncio.ensure_future(self._rebalance_for_ever()))

    async def close(self) -> None:
        """Ends all of it; moves end by themselves or with their pool."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def look(self) -> None:
        """Takes the books now."""
        if self._rows_LE is not None:
            self.traffic.look(self._clock(), self._rows_LE)

    async def rebalance(self, dry_run: bool = False, force: bool = False) -> Rebalanced:
        """Plans, and moves if it is worth it. A caller that goes away ends neither.

        dry_run: only plan. force: move also when balance is good enough or the gain does not exceed the cost.
        Raises what a move raises; those before it stay.
        """
        task = asyncio.ensure_future(self._rebalance(dry_run, force))
        self._keep(task)
        return await asyncio.shield(task)

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:  # its caller may have gone away
            logger.warning("a rebalance ended early: %s", task.exception())

    async def _measure(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(self.settings.sample_interval)

    async def _rebalance_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.interval)
            if self._pacing.is_resting(self._clock()):
                continue
            try:
                found = await self._rebalance(dry_run=True, force=False)
                if self._pacing.should_move(self._clock(), bool(found.moves) and not found.reason):
                    await self._rebalance(dry_run=False, force=False)
            except GrokmoeError as error:
                logger.warning("rebalancing was given up: %s", error)
                self._pacing.moved(self._clock())

    async def _rebalance(self, dry_run: bool, force: bool) -> Rebalanced:
        async with self._lock:
            self.look()
            measured = self.traffic.imbalance()
            workers = [member for member in self._members.members if member.is_usable]
            situation, why_not = self._situation(workers)
            if situation is None:
                return Rebalanced(imbalance=measured, forecast=measured, reason=why_not)
            units_L = self._units()
            plan = await asyncio.to_thread(make_plan, situation, self.settings)
            found = self._told(plan, workers, units_L, measured)
            reason = self._objection(plan, measured, force)
            if dry_run or reason:
                return dataclasses.replace(found, reason=reason)
            logger.info("rebalancing: %d steps, imbalance %.2f to %.2f", len(plan.steps), measured, plan.forecast)
            try:
                for move in found.moves:
                    await self._moves.make(move.experts, move.source, move.target)
            finally:
                self._pacing.moved(self._clock())
            return dataclasses.replace(found, done=True)

    def _objection(self, plan: Plan, measured: float, force: bool) -> str:
        """Why the plan is not carried out; empty: nothing stands against it."""
        if not plan.steps:
            return "no better placement is known"
        if force:
            return ""
        if max(measured, plan.imbalance) <= self.settings.threshold:
            return f"the imbalance does not exceed {self.settings.threshold:g}"
        if not plan.is_worth_it:
            return "the gain does not exceed the cost"
        return ""

    def _units(self) -> list[list[int]]:
        """Of every layer what has a place there: the planner knows it by its number in this list."""
        assert self._members.placement is not None
        return [list(row) for row in self._members.placement.holders]

    def _told(
        self, plan: Plan, workers: Sequence[ExpertMember], units_L: Sequence[Sequence[int]], measured: float
    ) -> Rebalanced:
        moves = tuple(
            PlannedMove(
                ranges_of((layer, units_L[layer][each]) for layer, each in step.pairs),
                "" if step.source is None else workers[step.source].link.address,
                "" if step.target is None else workers[step.target].link.address,
            )
            for step in plan.steps
        )
        return Rebalanced(moves, measured, plan.forecast, plan.gain, plan.cost)

    def _situation(self, workers: Sequence[ExpertMember]) -> tuple[Situation | None, str]:
        """What a plan needs to know; or None, and why there can be no plan."""
        members = self._members
        load_LE = self.traffic.load_LE()
        if load_LE is None or not self.traffic.is_enough:
            return None, f"fewer than {self.settings.min_rows} rows were seen lately"
        away = [member.name for member in members.members if not member.is_usable and not member.is_removed]
        if away:
            return None, f"{away[0]} is not in use: it may come back with what it holds"
        if members.has_preferences:
            return None, "the placement was given at start: move experts one by one"
        if self._moves.under_way:
            return None, "a move is under way"
        assert members.placement is not None
        for layer, several in enumerate(members.placement.slicings):
            for expert, slicings in several.items():
                numbers = " and in ".join(map(str, sorted(slicings)))
                return None, f"expert {expert} of layer {layer} is held in {numbers} slices: drop what is not to stay"
        units_L = self._units()
        held = [pairs_of(member.held) for member in workers]
        layouts = tuple(
            tuple(frozenset(each for each, unit in enumerate(units) if (layer, unit) in pairs) for pairs in held)
            for layer, units in enumerate(units_L)
        )
        for layer, (units, layout) in enumerate(zip(units_L, layouts, strict=True)):
            missing = set(range(len(units))).difference(*layout)
            if missing:
                return None, f"nobody holds expert {describe_unit(units[min(missing)])} of layer {layer}"
        size_LE = [[1 / num_slices_of(unit) for unit in units] for units in units_L]
        computed = [member.computed for member in workers]
        rows = sum(count for each in computed for count, _ in each.values())
        seconds = sum(spent for each in computed for _, spent in each.values())
        infos = [member.info for member in workers if member.info is not None]
        loaded = self._moves.loaded
        return Situation(
            [
                [rows_E[expert_of(unit)] * size for unit, size in zip(units, size_E, strict=True)]
                for rows_E, units, size_E in zip(load_LE, units_L, size_LE, strict=True)
            ],
            layouts,
            tuple(info.capacity for info in infos),
            tuple(relative_costs(computed)),
            seconds / rows if rows else 0.0,
            max(info.expert_bytes for info in infos),
            loaded.num_bytes / loaded.seconds if loaded.seconds else self.settings.load_rate,
            size_LE,
        ), ""
