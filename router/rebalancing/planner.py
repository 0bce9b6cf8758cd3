"""The plan: for every layer the better placement that is worth most, and the steps that lead to all of them.

Per layer there are two candidates: the best one there is, by replicating and packing anew and handing the packed sets
to those who have most of them; and the present one with a few improvements, which loads less. What saves more within
the horizon than loading costs is taken, the best layers first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from router.rebalancing.layer import Layout, copies_of, peak, size_of_loads, times
from router.rebalancing.matching import match
from router.rebalancing.packing import pack, replicate
from router.rebalancing.search import improve
from router.rebalancing.settings import RebalanceSettings
from router.rebalancing.situation import Situation
from router.rebalancing.steps import Holdings, Step, joined, steps_of_layer

MAX_EXTRA_COPIES = 16
"""Copies beyond the fewest that are tried per layer: what one more helps is less each time."""

_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Plan:
    """steps: in order; none if no better placement is known. imbalance, forecast: of the load as it is, before and
    after. gain: seconds of expert computation saved within the horizon. cost: what loading costs of them.
    """

    steps: tuple[Step, ...]
    imbalance: float
    forecast: float
    gain: float
    cost: float

    @property
    def is_worth_it(self) -> bool:
        """Whether the gain exceeds the cost."""
        return bool(self.steps) and self.gain > self.cost


@dataclasses.dataclass(frozen=True)
class _Option:
    layer: int
    wanted: Layout
    gain: float
    cost: float


def make_plan(situation: Situation, settings: RebalanceSettings) -> Plan:
    """Of the steps that are worth it; if none are, of those that would make it better all the same."""
    places_LW = situation.places()
    min_copies = settings.min_replicas or _fewest(situation)
    options: list[list[_Option]] = []
    cost_of_load = _seconds_per_load(situation, settings)
    for layer, present in enumerate(situation.layouts):
        load_E = situation.load_LE[layer]
        before = peak(present, load_E, situation.cost_W)
        found = []
        for wanted in _candidates(present, load_E, places_LW[layer], situation.cost_W, min_copies):
            saved = before - peak(wanted, load_E, situation.cost_W)
            if saved > before * _ROUNDING:
                gain = saved * situation.seconds_per_row * settings.horizon
                loads = size_of_loads(present, wanted, situation.sizes(layer))
                found.append(_Option(layer, wanted, gain, loads * cost_of_load))
        options.append(found)
    chosen = [max(found, key=_net) for found in options if found]
    paying = [option for option in chosen if _net(option) > 0]
    return _planned(situation, settings, min_copies, paying or chosen)


def _net(option: _Option) -> float:
    return option.gain - option.cost


def _fewest(situation: Situation) -> int:
    """Holders of the expert that has fewest."""
    layers = zip(situation.layouts, situation.load_LE, strict=True)
    return max(1, min(min(copies_of(layout, len(load_E))) for layout, load_E in layers))


def _seconds_per_load(situation: Situation, settings: RebalanceSettings) -> float:
    """Seconds of expert computation that one load costs all layers."""
    seconds = situation.pair_bytes / situation.load_rate
    return seconds * settings.load_slowdown * situation.peak_seconds(situation.layouts)


def _candidates(
    present: Layout, load_E: Sequence[float], places_W: Sequence[int], cost_W: Sequence[float], min_copies: int
) -> list[Layout]:
    """Placements of a layer that hold every expert often enough."""
    found = []
    if min(copies_of(present, len(load_E))) >= min_copies:
        found.append(improve(present, load_E, places_W, cost_W))
    num_places = sum(places_W)
    num_useful = sum(1 for places in places_W if places)
    fewest = min_copies * len(load_E)
    best: Layout | None = None
    for num_copies in range(fewest, min(num_places, fewest + MAX_EXTRA_COPIES) + 1):
        copies_E = replicate(load_E, num_copies, min_copies, num_useful)
        packed = pack(load_E, copies_E, places_W, cost_W) if max(copies_E) <= num_useful else None
        if packed is None:
            continue
        packed = improve(packed, load_E, places_W, cost_W)
        # A copy more must help by itself: it has to be loaded and takes memory.
        if best is None or peak(packed, load_E, cost_W) < peak(best, load_E, cost_W) * (1 - 0.01):
            best = packed
    if best is not None:
        found.append(_keeping(present, match(present, best, load_E, places_W, cost_W), load_E, places_W, cost_W))
    return found


def _keeping(
    present: Layout, wanted: Layout, load_E: Sequence[float], places_W: Sequence[int], cost_W: Sequence[float]
) -> Layout:
    """Leaves copies where they are that stand in nobody's way: they cost nothing, and somebody may need them."""
    kept = [set(held) for held in wanted]
    top = peak(wanted, load_E, cost_W) * (1 + _ROUNDING)
    for worker, held in enumerate(present):
        for expert in sorted(held - kept[worker]):
            if len(kept[worker]) < places_W[worker]:
                kept[worker].add(expert)
                if times(kept, load_E, cost_W)[worker] > top:
                    kept[worker].remove(expert)
    return tuple(map(frozenset, kept))


def _planned(situation: Situation, settings: RebalanceSettings, min_copies: int, chosen: Sequence[_Option]) -> Plan:
    """Puts the layers' steps in order. A layer that has no order stays as it is."""
    sizes_L = [situation.sizes(layer) for layer in range(len(situation.layouts))]
    start = Holdings(situation.layouts, situation.capacity_W, sizes_L, min_copies)
    holdings, steps, layouts = start.copy(), [], list(situation.layouts)
    gain = 0.0
    for option in sorted(chosen, key=_net, reverse=True):
        tried = holdings.copy()
        more = steps_of_layer(tried, option.layer, situation.layouts[option.layer], option.wanted)
        if more is not None:
            holdings, layouts[option.layer] = tried, option.wanted
            steps += more
            gain += option.gain
    before, after = situation.peak_seconds(situation.layouts), situation.peak_seconds(layouts)
    imbalance = situation.imbalance(situation.layouts)
    if after >= before * (1 - settings.min_improvement):
        return Plan((), imbalance, imbalance, 0.0, 0.0)
    max_pairs = max(1, settings.max_step_bytes // max(situation.pair_bytes, 1))
    loaded = sum(sizes_L[layer][each] for step in steps if step.target is not None for layer, each in step.pairs)
    return Plan(
        tuple(joined(steps, start, max_pairs)),
        imbalance,
        situation.imbalance(layouts),
        gain,
        loaded * _seconds_per_load(situation, settings),
    )
