"""Faults, and what was done about them, as metrics: read from the engine's books when somebody asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.engine import Engine
from router.experts.counters import Cause
from router.fault_counters import FaultCounters
from router.worker_state import WorkerState

_ATTENTION = {
    "losses": "Times an attention worker was lost while in use.",
    "hangs": "Of these, because it took too long.",
    "migrations": "Sequences recomputed because their attention worker was lost in the middle of a step.",
    "moves": "Sequences that left an attention worker that drains or is slow.",
    "migration_limits": "Requests ended because they had lost their attention worker too often.",
    "faulty_chunks": "Chunks that an attention worker computed as something that is not finite.",
    "abandoned_steps": "Steps cut off because nobody wanted them any more.",
    "lane_restarts": "Bugs that ended a lane; its requests failed.",
    "book_errors": "Invariants found broken.",
}
assert set(_ATTENTION) == {field.name for field in dataclasses.fields(FaultCounters)}

_EXPERTS = {
    "calls": "Messages of rows sent to expert workers, retries and hedges included.",
    "failovers": "Times an expert worker was taken out of use.",
    "corrupt": "Answers of expert workers that cannot be: NaN, wrong shape or type.",
}


class FaultCollector(Collector):
    """Everything an operator wants to see at zero."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """One family per counter, and the state of every worker."""
        engine = self._engine
        for name, text in _ATTENTION.items():
            yield CounterMetricFamily(f"grokmoe_{name}", text, value=getattr(engine.faults, name))
        yield CounterMetricFamily(
            "grokmoe_requests_refused", "Requests refused because the queue was full.", engine.admission.num_refused
        )
        state = GaugeMetricFamily(
            "grokmoe_worker_state", "1 for the state a worker is in.", labels=("role", "worker", "state")
        )
        for role, workers in (("attention", engine.cells), ("expert", engine.pool.members if engine.pool else ())):
            for worker in workers:
                for each in WorkerState:
                    state.add_metric((role, str(worker.index), each.value), float(worker.state is each))
        yield state
        yield from self._experts()

    def _experts(self) -> Iterator[Metric]:
        pool = self._engine.pool
        if pool is None:
            return
        counters = pool.counters
        yield GaugeMetricFamily(
            "grokmoe_placement_version", "Grows whenever the table of who holds what changes.", pool.placement_version
        )
        yield GaugeMetricFamily(
            "grokmoe_expert_imbalance", "Load of the busiest expert worker over the mean, lately; 0: unknown.",
            pool.rebalancer.traffic.imbalance(),
        )  # fmt: skip
        yield GaugeMetricFamily("grokmoe_expert_moves", "Moves of experts under way.", len(pool.moves.under_way))
        for name, text in _EXPERTS.items():
            yield CounterMetricFamily(f"grokmoe_expert_{name}", text, value=getattr(counters, name))
        retries = CounterMetricFamily("grokmoe_expert_retries", "Rows sent again, by cause.", labels=("cause",))
        for cause in Cause:
            retries.add_metric((cause.value,), counters.retries[cause])
        yield retries
        hedges = CounterMetricFamily("grokmoe_expert_hedges", "Second calls, by outcome.", labels=("outcome",))
        hedges.add_metric(("won",), counters.hedges_won)
        hedges.add_metric(("lost",), counters.hedges_lost)
        yield hedges
