"""One step as spans of an attention worker, under the step's span of whichever traces its plan names.

    attention step     the plan's arrival to the result, with the seconds of its stages
    +- attention          a MoE output's arrival to the next MoE input (or the result): one per layer, and one more

Only for plans that name a trace, and where `--traces` says where to.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from grokmoe.step_plan import StepPlan
from grokmoe.tracing import Attributes, Tracing


class StepTrace:
    """Written when the step has ended; until then only times are kept."""

    def __init__(self, tracing: Tracing, plan: StepPlan) -> None:
        self._tracing, self._plan = tracing, plan
        self._begin = time.monotonic()
        self._turns: list[tuple[int, float, float]] = []

    @classmethod
    def of(cls, tracing: Tracing | None, plan: StepPlan) -> StepTrace | None:
        """None: nobody wants it."""
        return cls(tracing, plan) if tracing is not None and plan.traceparents else None

    def turn(self, layer: int, seconds: float) -> None:
        """The worker has just computed up to the hole of `layer`, or to the end of the model."""
        end = time.monotonic()
        self._turns.append((layer, end - seconds, end))

    def end(self, stages_ns: Mapping[str, int], error: str = "") -> None:
        """The step is over. error: why there is no result."""
        chunks = self._plan.chunks
        attributes: Attributes = {
            "tokens": sum(len(chunk.token_ids) for chunk in chunks),
            "sequences": len(chunks),
            **{f"stage.{stage}": spent_ns / 1e9 for stage, spent_ns in stages_ns.items() if spent_ns},
        }
        for span in self._tracing.under(self._plan.traceparents, "attention step", self._begin):
            for layer, begin, end in self._turns:
                span.child("attention", begin, end, {"layer": layer})
            span.end(time.monotonic(), attributes, error)
