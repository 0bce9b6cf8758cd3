"""Faults one after the other at random times under load, and what each did to the clients."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import math
import random
import time
from collections.abc import AsyncIterator, Iterable, Sequence

from benchmarks.chaos.cluster import ChaosCluster, ClusterPlan
from benchmarks.chaos.faults import FAULTS, Setting
from benchmarks.chaos.load import Job, Load, Outcome, reference
from grokmoe import AsyncClient

UNDISTURBED = "none"
"""The kind of the spans in which nothing is done."""

RECOVERY_TIMEOUT = 90.0
"""Seconds in which a cluster must be whole again after a fault."""

MAX_PAUSE = 0.5
"""Longest pause between two faults, seconds."""

RESUME_SPAN = 4.0
"""Seconds more before a fault of the router: clients that it broke off try again after pauses that grow. A fault that
comes before them would be counted with the last one as a single stall."""

CALM_SPAN = 2.5
"""Seconds of one undisturbed span: about those of a fault, so that the longest waits can be compared."""

TAIL = 0.3
"""Seconds after a recovery that still count as the fault's: the return of a worker is not to disturb either."""


@dataclasses.dataclass
class Effect:
    """What clients saw of one fault. Seconds.

    stall: longest wait between two deltas of one stream. first_wait: longest wait for a first delta. back: from the
    moment the fault was over to the router's use of every worker; None: not within RECOVERY_TIMEOUT.
    num_requests: streams that were alive meanwhile. num_lost, num_changed: streams in which that happened then.
    """

    kind: str
    target: str
    stall: float
    first_wait: float
    back: float | None
    num_requests: int
    num_lost: int
    num_changed: int
    errors: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of time, and which fault filled it."""

    kind: str
    target: str
    begin: float
    end: float
    back: float | None


class Campaign:
    """A cluster, its load, and the spans of the faults so far."""

    def __init__(self, cluster: ChaosCluster, client: AsyncClient, load: Load, draw: random.Random) -> None:
        self.cluster, self.client, self.load, self._draw = cluster, client, load, draw
        self.spans: list[Span] = []
        self._num_settled = 0
        self.num_without_effect: collections.Counter[tuple[str, str]] = collections.Counter()

    async def calm(self, seconds: float) -> None:
        """Lets the load run undisturbed, in spans about as long as a fault's: what the machine's own noise does."""
        over = time.monotonic() + seconds
        while (begin := time.monotonic()) < over:
            await asyncio.sleep(min(CALM_SPAN, over - begin))
            self._note(UNDISTURBED, "-", begin, time.monotonic(), None)

    async def inject(self, kind: str, target: str, max_pause: float = MAX_PAUSE) -> Span | None:
        """One fault of a random node of a role, or of the node of that name, while streams are in mid-answer.

        max_pause: longest random time before it. Returns when the cluster is whole again; None if the fault met
        nobody, such as an idle worker's answers.
        """
        await asyncio.sleep(self._draw.uniform(0.0, max_pause) + (RESUME_SPAN if target in ("router", "all") else 0.0))
        async with asyncio.timeout(RECOVERY_TIMEOUT):
            await self.load.wait_decoding(1)
        node = self._draw.choice(self.cluster.of(target))
        begin = time.monotonic()
        had_effect = await FAULTS[kind].inject(self.cluster, node, self._draw)
        over = time.monotonic()
        whole = await self.cluster.wait_whole(self.client, RECOVERY_TIMEOUT)
        if not had_effect:
            self.num_without_effect[kind, target] += 1
            return None
        await asyncio.sleep(TAIL)
        return self._note(kind, target, begin, time.monotonic(), None if whole is None else whole - over)

    def _note(self, kind: str, target: str, begin: float, end: float, back: float | None) -> Span:
        self.spans.append(Span(kind, target, begin, end, back))
        return self.spans[-1]

    def latest(self) -> Effect:
        """Of the last span, so far. Costs the load less of its time than all of them would."""
        return effect_of(self.spans[-1], math.inf, self.load.outcomes, time.monotonic())

    def effects(self) -> list[Effect]:
        """One per span. Final once the load has ended."""
        return [self._effect(index) for index in range(len(self.spans))]

    def settled(self, is_over: bool = False) -> list[Effect]:
        """Effects that are final and were not asked for before, in order: the next span has begun, and every stream
        that was alive has ended. is_over: the load has ended, so all are."""
        done: list[Effect] = []
        while self._num_settled < len(self.spans) - (not is_over):
            over = self.spans[self._num_settled + 1].begin if self._num_settled + 1 < len(self.spans) else math.inf
            if not is_over and any(outcome.end is None and outcome.begin < over for outcome in self.load.outcomes):
                break
            done.append(self._effect(self._num_settled))
            self._num_settled += 1
        return done

    def _effect(self, index: int) -> Effect:
        over = self.spans[index + 1].begin if index + 1 < len(self.spans) else math.inf
        return effect_of(self.spans[index], over, self.load.outcomes, time.monotonic())


def effect_of(span: Span, until: float, outcomes: Sequence[Outcome], now: float) -> Effect:
    """What became of the streams that were alive in a span, and the longest of their waits that touch it.

    until: when the next span begins. What goes wrong between a span and the next one is the earlier one's doing.
    """
    alive = [outcome for outcome in outcomes if outcome.begin < span.end and (outcome.end or now) > span.begin]

    def longest(waits: Iterable[tuple[float, float]]) -> float:
        # What the next fault adds to a wait is not this one's doing.
        touching = (min(end, until) - begin for begin, end in waits if begin < span.end and end > span.begin)
        return max(touching, default=0.0)

    def is_here(moment: float | None) -> bool:
        return moment is not None and span.begin <= moment < until

    errors = tuple(outcome.error for outcome in outcomes if outcome.error and is_here(outcome.end))
    return Effect(
        span.kind,
        span.target,
        longest(wait for outcome in alive for wait in outcome.waits(now)),
        longest(outcome.first_wait(now) for outcome in alive),
        span.back,
        len(alive),
        len(errors),
        sum(is_here(outcome.changed_at) for outcome in outcomes),
        errors,
    )


def plan_for(needs: Setting, base: ClusterPlan) -> ClusterPlan:
    """The cluster in which kinds with these needs can be done."""
    workers = ("attention", "expert")
    return dataclasses.replace(
        base,
        proxied=workers if needs.is_proxied else (),
        in_namespaces=workers if needs.has_cables else (),
        full_disk=("router", *workers) if needs.is_disk_full else (),
    )


@contextlib.asynccontextmanager
async def campaign(
    plan: ClusterPlan, jobs: Sequence[Job], expected: Sequence[tuple[int, ...]] | None, concurrency: int, seed: int
) -> AsyncIterator[Campaign]:
    """Starts a cluster, then yields with the load running.

    expected: the tokens of each job; None: computed first, by this cluster, undisturbed. seed: of the faults.
    Leaving it lets the load finish first, so that every stream has an outcome.
    """
    async with ChaosCluster(plan) as cluster, AsyncClient(cluster.router.address) as client:
        await client.wait_ready(RECOVERY_TIMEOUT)
        if expected is None:
            expected = await reference(client, jobs)
        async with Load(client, jobs, expected, concurrency, resume=True) as load:
            yield Campaign(cluster, client, load, random.Random(seed))
