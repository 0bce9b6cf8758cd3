"""Faults, and what was done about them, as metrics: read from the engine's books when somebody asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.engine import Engine
from router.experts import ExpertPool
from router.experts.counters import Cause
from router.fault_counters import FaultCounters
from router.worker_state import WorkerState

_ATTENTION = {
    "losses": "Times an attention worker was lost while in use.",
    "hangs": "Losses of attention workers because one took too long.",
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


def _families() -> dict[str, Metric]:
    """Every family, empty, by its name."""
    counters = {name: text for name, text in _ATTENTION.items()}
    counters["requests_refused"] = "Requests refused because the queue was full."
    counters |= {f"expert_{name}": text for name, text in _EXPERTS.items()}
    families: list[Metric] = [CounterMetricFamily(f"grokmoe_{name}", text) for name, text in counters.items()]
    families += [
        GaugeMetricFamily(
            "grokmoe_worker_state", "1 for the state a worker is in.", labels=("role", "worker", "state")
        ),
        GaugeMetricFamily(
            "grokmoe_experts_unheld", "Experts, and slices, layer by layer, that no worker in use holds."
        ),
        GaugeMetricFamily(
            "grokmoe_expert_holders_least",
            "Workers in use that hold the expert or slice that fewest hold.",
        ),
        GaugeMetricFamily("grokmoe_placement_version", "Grows whenever the table of who holds what changes."),
        GaugeMetricFamily(
            "grokmoe_expert_imbalance", "Load of the busiest expert worker over the mean, lately; 0: unknown."
        ),
        GaugeMetricFamily("grokmoe_expert_moves", "Moves of experts under way."),
        CounterMetricFamily("grokmoe_expert_retries", "Rows sent again, by cause.", labels=("cause",)),
        CounterMetricFamily("grokmoe_expert_hedges", "Second calls, by outcome.", labels=("outcome",)),
    ]
    return {family.name: family for family in families}


class FaultCollector(Collector):
    """Everything an operator wants to see at zero."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @staticmethod
    def describe() -> list[Metric]:
        """Every family, without values. Those of experts are only collected where experts are remote."""
        return list(_families().values())

    def collect(self) -> Iterator[Metric]:
        """One family per counter, and the state of every worker."""
        engine, values = self._engine, _Values()
        for name in _ATTENTION:
            values.add(name, getattr(engine.faults, name))
        values.add("requests_refused", engine.admission.num_refused)
        for role, workers in (("attention", engine.cells), ("expert", engine.pool.members if engine.pool else ())):
            for worker in workers:
                for each in WorkerState:
                    values.add("worker_state", float(worker.state is each), role, str(worker.index), each.value)
        if engine.pool is not None:
            self._add_experts(engine.pool, values)
        yield from (family for family in values.families.values() if family.samples)

    def _add_experts(self, pool: ExpertPool, values: _Values) -> None:
        counters = pool.counters
        if pool.placement is not None:
            usable = {member.index for member in pool.members if member.is_usable}
            holders = [len(usable.intersection(each)) for layer in pool.placement.holders for each in layer.values()]
            values.add("experts_unheld", holders.count(0))
            values.add("expert_holders_least", min(holders))
        values.add("placement_version", pool.placement_version)
        values.add("expert_imbalance", pool.rebalancer.traffic.imbalance())
        values.add("expert_moves", len(pool.moves.under_way))
        for name in _EXPERTS:
            values.add(f"expert_{name}", getattr(counters, name))
        for cause in Cause:
            values.add("expert_retries", counters.retries[cause], cause.value)
        values.add("expert_hedges", counters.hedges_won, "won")
        values.add("expert_hedges", counters.hedges_lost, "lost")


class _Values:
    """The families of one collection as they are filled."""

    def __init__(self) -> None:
        self.families = _families()

    def add(self, name: str, value: float, *labels: str) -> None:
        """name: without the prefix that all have. labels: values, in the family's order."""
        self.families[f"grokmoe_{name}"].add_metric(labels, value)  # type: ignore[attr-defined]
