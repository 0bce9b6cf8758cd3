"""What grokmoe is to reach beside the others, and whether it did. Pure."""

from __future__ import annotations

import dataclasses
import statistics

from benchmarks.peers.results import Results
from benchmarks.peers.workload import Metric, decode, first_token, gap_beside, prefill, served

FUSED = "grokmoe"
INT8 = "grokmoe int8"
LLAMA = "llama.cpp bf16"
LLAMA_Q8 = "llama.cpp q8_0"
VLLM = "vLLM"
TORCH = "straight torch"
PARTS = "its parts"
"""TORCH: the forward with nothing around it. PARTS: the same run, only the products and the attention in it."""

PEERS = (LLAMA, LLAMA_Q8, VLLM)
"""Who else serves the model. LLAMA_Q8 counts as one wherever bfloat16 is not asked for."""

BFLOAT16_PEERS = (LLAMA, VLLM)


def split(num_experts: int) -> str:
    """The row of the split topology with so many expert workers."""
    return f"grokmoe split {num_experts}"


@dataclasses.dataclass(frozen=True)
class Goal:
    """`row` reaches `bound` times the best of `others` in `metric`; without others, `bound` itself.

    Of a metric of which less is better the bound is the most there may be, else the least.
    """

    metric: Metric
    row: str
    bound: float
    others: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of a goal. value: a ratio, or in the metric's unit without others; None: not measured.

    other: the best of the goal's others. low, high: the smallest and the largest of the rounds.
    """

    goal: Goal
    other: str | None = None
    value: float | None = None
    low: float = 0.0
    high: float = 0.0

    @property
    def is_met(self) -> bool | None:
        """None: not measured."""
        if self.value is None:
            return None
        return self.value >= self.goal.bound if self.goal.metric.more_is_better else self.value <= self.goal.bound


def goals(split_counts: tuple[int, ...] = (2, 4)) -> list[Goal]:
    """All of them. split_counts: numbers of expert workers."""
    found = [
        Goal(prefill(512), FUSED, 2.4, PEERS),
        Goal(prefill(2048), FUSED, 2.2, PEERS),
        Goal(decode(1), FUSED, 1.0, BFLOAT16_PEERS),
        Goal(decode(1), INT8, 1.1, (LLAMA_Q8,)),
        Goal(decode(8), FUSED, 1.1, PEERS),
        Goal(decode(32), FUSED, 1.6, PEERS),
        Goal(served(32), FUSED, 3.0, (LLAMA,)),
        Goal(first_token(32), FUSED, 1 / 3, (LLAMA,)),
        Goal(gap_beside(32, 2048), FUSED, 300.0),
    ]
    loads = (prefill(512), prefill(2048), decode(1), decode(8), decode(32))
    found += [Goal(load, FUSED, 1.0, (TORCH,)) for load in loads]
    found += [Goal(load, FUSED, 0.85, (PARTS,)) for load in loads]
    found += [Goal(decode(batch), split(count), 0.85, (FUSED,)) for count in split_counts for batch in (8, 32)]
    return found


def judge(goal: Goal, results: Results) -> Verdict:
    """The median over the rounds, of the ratio to the one who is best by its median."""
    if not goal.others:
        values = list(results.values(goal.row, goal.metric).values())
        return _verdict(goal, None, values)
    other = results.best(goal.others, goal.metric)
    return _verdict(goal, other, [] if other is None else results.ratios(goal.row, other, goal.metric))


def _verdict(goal: Goal, other: str | None, values: list[float]) -> Verdict:
    if not values:
        return Verdict(goal, other)
    return Verdict(goal, other, statistics.median(values), min(values), max(values))
