"""What a finished step adds to the metrics and to the sums that GetStatus shows."""

from __future__ import annotations

from collections.abc import Sequence

from grokmoe.telemetry import RouterMetrics
from router.cell import AttentionCell
from router.legs import LEGS, Legs
from router.moe import RowCounter
from router.step import Step


class StepReport:
    """Sums since start: seconds per leg over `num_steps` steps, and what has been told to Prometheus already."""

    def __init__(self, metrics: RouterMetrics, cells: Sequence[AttentionCell], counter: RowCounter) -> None:
        self.leg_seconds: dict[str, float] = dict.fromkeys(LEGS, 0.0)
        self.num_steps = 0
        self._metrics, self._cells, self._counter = metrics, cells, counter
        self._leg_time = {leg: metrics.leg_time.labels(leg) for leg in LEGS}
        self._told = {"preemptions": 0, "queries": 0, "hits": 0}
        self._told_rows: dict[int, int] = {}

    @property
    def num_preemptions(self) -> int:
        """Sequences preempted, all cells."""
        return sum(cell.scheduler.num_preemptions for cell in self._cells if cell.info)

    def step_done(self, cell: AttentionCell, step: Step, seconds: float, legs: Legs) -> None:
        """Takes in one step of one cell."""
        metrics = self._metrics
        self.num_steps += 1
        for leg, spent in legs.seconds.items():
            self.leg_seconds[leg] += spent
            self._leg_time[leg].observe(spent)
        metrics.step_time.observe(seconds)
        metrics.step_tokens.observe(step.num_tokens)
        ledger = cell.scheduler.ledger
        for state, pages in (("used", ledger.num_used), ("cached", ledger.num_cached), ("free", ledger.num_free)):
            metrics.kv_pages.labels(str(cell.index), state).set(pages)
        self._tell_counters()

    def _tell_counters(self) -> None:
        metrics = self._metrics
        schedulers = [cell.scheduler for cell in self._cells if cell.info]
        for name, counter, total in (
            ("preemptions", metrics.preemptions, self.num_preemptions),
            ("queries", metrics.prefix_queries, sum(each.prefix_queries_tokens for each in schedulers)),
            ("hits", metrics.prefix_hits, sum(each.prefix_hits_tokens for each in schedulers)),
        ):
            # A cell that comes back counts from zero again; a Prometheus counter must not go back.
            counter.inc(max(0, total - self._told[name]))
            self._told[name] = total
        for expert, total in enumerate(self._counter.by_expert()):
            new = total - self._told_rows.get(expert, 0)
            if new:
                metrics.expert_rows.labels(str(expert)).inc(new)
                self._told_rows[expert] = total
