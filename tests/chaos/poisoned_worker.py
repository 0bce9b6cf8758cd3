"""An attention worker that a certain prompt kills: `python -m tests.chaos.poisoned_worker` with a worker's flags."""

from __future__ import annotations

import os
import sys

from attention_worker.__main__ import main
from attention_worker.engine import AttentionEngine, StepRun
from grokmoe.step_plan import StepPlan

POISON = (7, 77, 777)
"""No other prompt begins with its first token."""

_begin = AttentionEngine.begin


def begin(engine: AttentionEngine, plan: StepPlan) -> StepRun:
    """See AttentionEngine.begin; ends the process at once instead, if the plan computes the beginning of POISON."""
    if any(chunk.start == 0 and chunk.token_ids[0] == POISON[0] for chunk in plan.chunks):
        os._exit(9)
    return _begin(engine, plan)


if __name__ == "__main__":
    AttentionEngine.begin = begin  # type: ignore[method-assign]
    sys.exit(main())
