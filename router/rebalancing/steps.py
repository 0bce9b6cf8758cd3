"""From one placement to another in steps, each of which can be the last: nothing is ever missing or too much.

A step gives experts to one worker, or takes them off one, or both, in this order. After every one of them each expert
has as many holders as before the first, or as `min_copies` asks for, whichever is fewer, and no worker ever holds
more than it has room for, not even between giving and taking.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence

from router.placement import Pair
from router.rebalancing.layer import Layout, copies_of
from router.rebalancing.situation import ROUNDING


@dataclasses.dataclass(frozen=True)
class Step:
    """Experts that `target` loads and then `source` gives up; None: nobody does."""

    pairs: frozenset[Pair]
    source: int | None
    target: int | None


class Holdings:
    """Who holds what while steps are tried out."""

    def __init__(
        self, layouts: Sequence[Layout], capacity_W: Sequence[int], size_LE: Sequence[Sequence[float]], min_copies: int
    ) -> None:
        """capacity_W: most whole experts of one layer on each worker; 0: any number. size_LE: of every expert."""
        self._held: list[set[Pair]] = [set() for _ in capacity_W]
        for layer, layout in enumerate(layouts):
            for worker, experts in enumerate(layout):
                self._held[worker].update((layer, expert) for expert in experts)
        self._capacity_W, self._size_LE = capacity_W, size_LE
        self._used_W = [self._size(pairs) for pairs in self._held]
        self._floor = {
            (layer, expert): min(copies, min_copies)
            for layer, layout in enumerate(layouts)
            for expert, copies in enumerate(copies_of(layout, len(size_LE[layer])))
        }

    def copy(self) -> Holdings:
        """Another one of the same contents."""
        other = copy.copy(self)
        other._held = [set(held) for held in self._held]
        other._used_W = [*self._used_W]
        return other

    @property
    def num_workers(self) -> int:
        """All of them, whatever they hold."""
        return len(self._held)

    def _size(self, pairs: Iterable[Pair]) -> float:
        return sum(self._size_LE[layer][expert] for layer, expert in pairs)

    def has_room(self, worker: int, pairs: Iterable[Pair]) -> bool:
        """Whether a worker can hold these, none of which it holds, too."""
        capacity = self._capacity_W[worker]
        return not capacity or self._used_W[worker] + self._size(pairs) <= capacity + ROUNDING

    def holds(self, worker: int, pair: Pair) -> bool:
        """Whether a worker holds a pair."""
        return pair in self._held[worker]

    def spare(self, pair: Pair) -> int:
        """Holders that could give a pair up."""
        return sum(pair in held for held in self._held) - self._floor[pair]

    def apply(self, step: Step) -> bool:
        """Does a step, if nothing stands against it. Otherwise nothing is changed."""
        source, target, pairs = step.source, step.target, step.pairs
        if target is not None and (pairs & self._held[target] or not self.has_room(target, pairs)):
            return False
        if source is not None and not pairs <= self._held[source]:
            return False
        if target is None and any(self.spare(pair) < 1 for pair in pairs):
            return False
        if target is not None:
            self._held[target] |= pairs
            self._used_W[target] += self._size(pairs)
        if source is not None:
            self._held[source] -= pairs
            self._used_W[source] -= self._size(pairs)
        return True


def steps_of_layer(holdings: Holdings, layer: int, present: Layout, wanted: Layout) -> list[Step] | None:
    """One expert a step, in an order that works; they are applied to `holdings`. None: there is no such order, and
    `holdings` may be half done.
    """
    pending = _differences(layer, present, wanted)
    done: list[Step] = []
    num_detours = 0
    while pending:
        # What frees memory first, then what keeps it, then what takes it.
        pending.sort(key=lambda step: (step.target is not None, step.source is None, sorted(step.pairs)))
        step = next((each for each in pending if holdings.apply(each)), None)
        if step is not None:
            pending.remove(step)
            done.append(step)
            continue
        detour = _detour(holdings, pending) if num_detours < len(present) else None
        if detour is None:
            return None
        num_detours += 1
        blocked, first, rest = detour
        holdings.apply(first)
        done.append(first)
        pending.remove(blocked)
        pending.append(rest)
    return done


def _differences(layer: int, present: Layout, wanted: Layout) -> list[Step]:
    """What has to be done, as moves as far as one worker gets what another one gives up."""
    givers: dict[int, list[int]] = {}
    takers: dict[int, list[int]] = {}
    for worker, (old, new) in enumerate(zip(present, wanted, strict=True)):
        for expert in old - new:
            givers.setdefault(expert, []).append(worker)
        for expert in new - old:
            takers.setdefault(expert, []).append(worker)
    steps = []
    for expert in sorted({*givers, *takers}):
        sources, targets = givers.get(expert, []), takers.get(expert, [])
        for index in range(max(len(sources), len(targets))):
            source = sources[index] if index < len(sources) else None
            target = targets[index] if index < len(targets) else None
            steps.append(Step(frozenset({(layer, expert)}), source, target))
    return steps


def _detour(holdings: Holdings, pending: Sequence[Step]) -> tuple[Step, Step, Step] | None:
    """A way round where everybody waits for somebody's memory: the step that is blocked, and two instead of it.

    An expert that has holders to spare is given up before it is loaded; any other is put by on a third worker.
    """
    for step in pending:
        if step.source is None or step.target is None:
            continue
        (pair,) = step.pairs
        if holdings.spare(pair) > 0:
            return step, Step(step.pairs, step.source, None), Step(step.pairs, None, step.target)
    for step in pending:
        if step.source is None or step.target is None:
            continue
        (pair,) = step.pairs
        for third in range(holdings.num_workers):
            if (
                third not in (step.source, step.target)
                and not holdings.holds(third, pair)
                and holdings.has_room(third, step.pairs)
            ):
                return step, Step(step.pairs, step.source, third), Step(step.pairs, third, step.target)
    return None


def joined(steps: Sequence[Step], start: Holdings, max_pairs: int) -> list[Step]:
    """Puts steps between the same two workers together, as far as all of them can still be done one after the other.

    start: before the first step. max_pairs: most of one step.
    """
    groups: list[Step] = []
    for step in steps:
        groups = _with(groups, step, start, max_pairs) or [*groups, step]
    return groups


def _with(groups: Sequence[Step], step: Step, start: Holdings, max_pairs: int) -> list[Step] | None:
    """The groups with the step in the last one of its kind; None when it cannot be."""
    for index in reversed(range(len(groups))):
        group = groups[index]
        if (group.source, group.target) != (step.source, step.target):
            continue
        if len(group.pairs) + len(step.pairs) > max_pairs or group.pairs & step.pairs:
            return None
        tried = [*groups]
        tried[index] = Step(group.pairs | step.pairs, step.source, step.target)
        return tried if all(map(start.copy().apply, tried)) else None
    return None
