"""From the result of a step to the generations that wait for it."""

from __future__ import annotations

from collections.abc import Collection

from grokmoe.step_plan import StepPlan, StepResult
from router.cell.hooks import CellHooks
from router.plan_writer import read_extras
from router.scheduler import Scheduler
from router.step import Step


def deliver(
    hooks: CellHooks,
    scheduler: Scheduler,
    step: Step,
    plan: StepPlan,
    result: StepResult,
    faulty: Collection[int] = (),
) -> None:
    """Completes the step and hands out its tokens and tables. faulty: places of chunks that cannot be used."""
    logprobs = {}
    unusable = {step.chunks[place] for place in faulty}
    for extra in read_extras(step, plan, result):
        sequence = extra.chunk.sequence
        generation = hooks.generation_of(sequence)
        if generation is None or extra.chunk in unusable:
            continue
        if extra.logits is not None:
            generation.put_logits(extra.chunk.start, extra.logits)
        if extra.prompt_logprobs is not None:
            generation.put_prompt_logprobs(extra.chunk.start, extra.prompt_logprobs)
        if extra.logprobs is not None:
            logprobs[sequence] = extra.logprobs
    for drawn in scheduler.complete(step, result.token_ids, faulty):
        generation = hooks.generation_of(drawn.sequence)
        if generation is not None:
            generation.put(drawn, logprobs.get(drawn.sequence))
            if drawn.finish_reason is not None:
                hooks.ended(drawn.sequence)
