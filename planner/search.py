"""The cheapest cluster that serves a load within its goals, or the most that given devices serve.

Clusters are all combinations of cards per copy, copies, attention workers, routers and lanes. Those whose bound is too
low are left out; of the others the cheapest ones are simulated, one after another, until one holds.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from grokmoe.errors import ConfigError
from grokmoe.model_config import ModelConfig
from planner.arrivals import Load, mean_length
from planner.bounds import Bound, Goals, Limits, bound
from planner.cluster import Cluster
from planner.costs import Costs
from planner.device import Group
from planner.forecast import Forecast, forecast, kv_tokens
from planner.layout import Layout, lay_out
from planner.memory import expert_room
from planner.step_time import StepTimer

COUNTS = tuple(sorted({*range(1, 9), *(round(base * 2**power) for power in range(3, 17) for base in (1, 1.5))}))
"""Numbers of copies and of attention workers that are tried: 1 to 8, then two to each doubling, up to 98304."""

PER_ROUTER = (1, 2, 4)
"""Attention workers of one router."""

MOST_LANES = 3
MOST_OF_A_UNIT = 8
"""Attention workers beside one set of copies, where any number of devices can be had and no rate is asked for."""
MOST_SIMULATED = 24
"""Clusters that are simulated, at most."""

SATURATED = (0.85, 0.7, 0.55, 0.4, 0.25)
"""Shares of the bound at which a cluster without a rate is simulated, until one holds: the bound's steps are all alike,
and nearer to it queues have no end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """What is wanted. rate 0: as much as there can be. copies: at least. lanes, routers 0: what is best."""

    config: ModelConfig
    dtype: str
    expert_dtype: str
    attention: Group
    experts: tuple[Group, ...]
    link: float
    round_trip: float | None
    kv_gib: float
    load: Load
    goals: Goals
    limits: Limits
    copies: int = 1
    lanes: int = 0
    routers: int = 0
    router_price: float = 0.0
    has_router_inside: bool = False
    rows_by_pairs: bool = False
    num_requests: int = 400
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Found:
    """A cluster, its bound and its forecast."""

    cluster: Cluster
    timer: StepTimer
    bound: Bound
    forecast: Forecast

    @property
    def holds(self) -> bool:
        """Whether it serves the load. A simulation ends, so of an overload it sees the beginning only: the bound, which
        knows no end, must allow the rate too."""
        return self.forecast.holds and self.forecast.rate <= self.bound.rate


def layouts(wish: Wish) -> list[Layout]:
    """Of one copy. Of one kind of device: the fewest that hold it, and numbers that divide the experts evenly."""
    config = wish.config
    num_pairs = config.num_experts * config.num_layers
    rooms = [expert_room(config, wish.expert_dtype, group.device) for group in wish.experts]
    for group in wish.experts:
        group.device.peak(wish.expert_dtype)
    if len(wish.experts) > 1:
        if wish.copies > 1:
            raise ConfigError("copies: of devices of several kinds one copy is made")
        counts = [group.count or 0 for group in wish.experts]
        devices = [group.device for group, count in zip(wish.experts, counts, strict=True) for _ in range(count)]
        of_each = [room for room, count in zip(rooms, counts, strict=True) for _ in range(count)]
        return [lay_out(devices, of_each, config.num_experts, config.num_layers)]
    group, room = wish.experts[0], rooms[0]
    if not room:
        raise ConfigError(f"{group.device.name} has no memory for one expert of one layer")
    fewest = -(-num_pairs // room)
    sizes = {fewest, *(size for size in range(fewest, config.num_experts + 1) if config.num_experts % size == 0)}
    if group.count is not None:
        if group.count < fewest * wish.copies:
            raise ConfigError(
                f"{group.count} x {group.device.name} do not hold {wish.copies} x {num_pairs} (expert, layer) pairs in "
                f"{wish.expert_dtype}: {room} each, so {fewest * wish.copies} are needed"
            )
        sizes = {size for size in sizes if size * wish.copies <= group.count}
    return [
        lay_out([group.device] * size, [room] * size, config.num_experts, config.num_layers) for size in sorted(sizes)
    ]


def clusters(wish: Wish) -> Iterator[Cluster]:
    """All combinations, the cheapest first."""
    found = []
    for layout in layouts(wish):
        for copies, attention in itertools.product(_copies(wish, layout), _attention(wish)):
            for routers, lanes in itertools.product(_routers(wish, attention), _lanes(wish)):
                found.append(
                    Cluster(
                        config=wish.config,
                        dtype=wish.dtype,
                        expert_dtype=wish.expert_dtype,
                        attention=wish.attention.device,
                        attention_workers=attention,
                        routers=routers,
                        lanes=lanes,
                        layout=layout,
                        copies=copies,
                        link=wish.link,
                        kv_gib=wish.kv_gib,
                        router_price=wish.router_price,
                        has_router_inside=wish.has_router_inside,
                        rows_by_pairs=wish.rows_by_pairs,
                        round_trip=wish.round_trip,
                    )
                )
    return iter(sorted(found, key=lambda cluster: (cluster.price, cluster.lanes)))


def _copies(wish: Wish, layout: Layout) -> Sequence[int]:
    if not wish.link or len(wish.experts) > 1:
        return [1]
    count = wish.experts[0].count
    if count is None:
        return [number for number in COUNTS if number >= wish.copies]
    return [number for number in COUNTS if wish.copies <= number <= count // len(layout.cards)]


def _attention(wish: Wish) -> Sequence[int]:
    if not wish.link:
        return [1]
    count = wish.attention.count
    return COUNTS if count is None else [number for number in {*COUNTS, count} if number <= count]


def _routers(wish: Wish, attention: int) -> Iterable[int]:
    if wish.has_router_inside:
        return [attention]
    if wish.routers:
        return [wish.routers] if attention % wish.routers == 0 else []
    return {attention // each for each in PER_ROUTER if attention % each == 0}


def _lanes(wish: Wish) -> Iterable[int]:
    return [wish.lanes] if wish.lanes else range(1, MOST_LANES + 1)


def search(wish: Wish, costs: Costs) -> Found:
    """The best cluster; its forecast says whether it holds. Raises ConfigError when nothing fits."""
    bounded = _bounded(wish, costs)
    return _most(wish, bounded) if not wish.load.rate else _cheapest(wish, bounded)


Bounded = tuple[Cluster, StepTimer, Bound]


def _bounded(wish: Wish, costs: Costs) -> Iterator[Bounded]:
    """Clusters with their bounds, the cheapest first."""
    prompt, output = mean_length(wish.load.prompt), mean_length(wish.load.output)
    shared: dict[Layout, StepTimer] = {}
    for cluster in clusters(wish):
        timer = StepTimer(cluster, costs, shared.get(cluster.layout))
        shared.setdefault(cluster.layout, timer)
        yield cluster, timer, bound(timer, prompt, output, wish.limits, kv_tokens(timer), wish.goals)


def _most(wish: Wish, bounded: Iterator[Bounded]) -> Found:
    """Of given devices the highest rate; of any number of them the most for its price, at a size that is one unit."""
    is_open = wish.attention.count is None or any(group.count is None for group in wish.experts)
    units = [
        each
        for each in bounded
        if not is_open or (each[0].copies == max(1, wish.copies) and each[0].attention_workers <= MOST_OF_A_UNIT)
    ]
    if not units:
        raise ConfigError("no cluster can be made of these devices")
    best = max(units, key=lambda each: _worth(each, is_open))
    if not best[2].rate:  # no batch keeps within the goals: one sequence at a time, half of the time
        return _simulated(wish, best, 0.5 / (mean_length(wish.load.output) * best[2].step))
    for share in SATURATED:
        found = _simulated(wish, best, best[2].rate * share)
        if found.holds:
            break
    return found


def _cheapest(wish: Wish, bounded: Iterator[Bounded]) -> Found:
    """The first whose simulation holds; if none does, the one that was nearest."""
    last, beaten, num_tried, most = None, wish.load.rate, 0, None
    for each in bounded:
        most = each if most is None or each[2].rate > most[2].rate else most
        if each[2].rate < beaten:
            continue
        last = _simulated(wish, each, wish.load.rate)
        num_tried += 1
        if last.holds or num_tried == MOST_SIMULATED:
            return last
        beaten = each[2].rate * 1.05
    if most is None:
        raise ConfigError("no cluster can be made of these devices")
    return last or _simulated(wish, most, wish.load.rate)


def _worth(each: Bounded, is_open: bool) -> tuple[float, float]:
    """Of given devices the rate counts; of any number what a request costs; where nothing holds, the step."""
    cluster, _, found = each
    if not found.rate:
        return 0.0, -found.step
    return (found.rate / max(cluster.price, 1e-9) if is_open else found.rate), -cluster.price


def _simulated(wish: Wish, each: Bounded, rate: float) -> Found:
    cluster, timer, found = each
    load = dataclasses.replace(wish.load, rate=rate)
    return Found(cluster, timer, found, forecast(timer, load, wish.limits, wish.goals, wish.num_requests, wish.seed))


def price_per_million(found: Found) -> float:
    """Price of a million output tokens at the forecast's load; infinite without any."""
    if not found.forecast.output_rate:
        return math.inf
    return found.cluster.price / (found.forecast.output_rate * 3600) * 1e6
