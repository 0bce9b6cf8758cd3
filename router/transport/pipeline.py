"""Several attention workers as one: each holds some layers in a row, and a step goes through them one after another.

        plan              hidden state           hidden state
    ------------> stage 0 ------------> stage 1 ------------> stage 2 ---> tokens
                  layers 0-20           layers 21-41          layers 42-63

Whoever drives an attention worker drives a pipeline the same way. It has one set of page ids: a page is in every stage,
with the keys and values of its layers. So a stage that is lost takes the pipeline's pages with it, and one that drains
drains the pipeline. Steps of different lanes are in different stages at the same time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import Sequence
from typing import Any

from grokmoe.errors import ConfigError, FailedPrecondition, Reason, Unavailable
from grokmoe.step_plan import LogitsScope, StepPlan, StepResult
from router.discovery import STAGE_JOINT
from router.legs import Legs
from router.transport.base import AttentionInfo, AttentionLink, FollowsStages, Hole, PipelineStage

logger = logging.getLogger(__name__)


class PipelineLink:
    """An AttentionLink made of several. stages: in any order; that of their layers is known when they have answered."""

    def __init__(self, stages: Sequence[AttentionLink]) -> None:
        self.address = STAGE_JOINT.join(stage.address for stage in stages)
        self.num_stages = len(stages)
        self._stages = tuple(stages)

    async def describe(self) -> AttentionInfo:
        """See AttentionLink. Unavailable while any stage is. ConfigError when they do not make one model.

        The first by its address is asked before the others: of two routers that want the same stages, the one with its
        lease gets them all, and neither waits for what the other has.
        """
        first, *others = sorted(self._stages, key=lambda stage: stage.address)
        infos = [(first, await _ask(first))]
        # All of them, whatever the others say: each question keeps a lease.
        answers = await asyncio.gather(*map(_ask, others), return_exceptions=True)
        for stage, answer in zip(others, answers, strict=True):
            if isinstance(answer, BaseException):
                raise answer
            infos.append((stage, answer))
        infos.sort(key=lambda each: each[1].layer_begin)
        info = compose([PipelineStage(stage.address, info) for stage, info in infos])
        self._stages = tuple(stage for stage, _ in infos)
        return info

    async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
        """See AttentionLink. StepNotBegun: a stage is lost that has never seen the plan; those before it may have."""
        stages, incarnations = self._stages, plan.incarnation.split(STAGE_JOINT)
        if len(incarnations) != len(stages):
            raise FailedPrecondition("the plan is for other stages", reason=Reason.WRONG_INCARNATION)
        *before, last = zip(stages, incarnations, strict=True)
        inner = _without_head(plan)
        faulty: set[int] = set()
        for stage, incarnation in before:
            part = dataclasses.replace(inner, incarnation=incarnation)
            result = await _run(stage, lane, part, hole, legs)
            if result.hidden_state is None:
                raise Unavailable("it gave no hidden state, though it has not the last layer")
            if new := set(result.faulty_chunks) - faulty:
                logger.warning("%s: %d chunks of a step are not finite", stage.address, len(new))
                faulty |= new
            inner = _going_on(inner, result.hidden_state)
        stage, incarnation = last
        part = _going_on(dataclasses.replace(plan, incarnation=incarnation), inner.hidden_state)
        result = await _run(stage, lane, part, hole, legs)
        return dataclasses.replace(result, faulty_chunks=tuple(sorted(faulty.union(result.faulty_chunks))))

    async def close(self) -> None:
        """See AttentionLink."""
        await asyncio.gather(*(stage.close() for stage in self._stages))


def compose(stages: Sequence[PipelineStage]) -> AttentionInfo:
    """What a pipeline says of itself. stages: in the order of their layers.

    Raises ConfigError when they differ in what must be one, or leave a layer out between them, or have it twice.
    """
    first = stages[0].info
    for stage in stages:
        for name in ("config_hash", "dtype", "page_size"):
            if (own := getattr(stage.info, name)) != (other := getattr(first, name)):
                raise ConfigError(f"{stage.address} has {name} {own}, {stages[0].address} has {other}")
    for before, after in itertools.pairwise(stages):
        if before.info.layer_end != after.info.layer_begin:
            held = ", ".join(
                f"{stage.info.layer_begin}-{stage.info.layer_end - 1} at {stage.address}" for stage in stages
            )
            what = "overlap" if before.info.layer_end > after.info.layer_begin else "leave layers out"
            raise ConfigError(f"the stages of a pipeline {what}: layers {held}")
    infos = [stage.info for stage in stages]
    return dataclasses.replace(
        first,
        incarnation=STAGE_JOINT.join(info.incarnation for info in infos),
        layer_end=infos[-1].layer_end,
        num_pages=min(info.num_pages for info in infos),
        max_step_tokens=min(info.max_step_tokens for info in infos),
        device=STAGE_JOINT.join(dict.fromkeys(info.place for info in infos)),
        num_ranks=1,
        is_draining=any(info.is_draining for info in infos),
        stages=tuple(stages),
    )


async def _ask(stage: AttentionLink) -> AttentionInfo:
    """Asks one of the stages; errors, and the log if the answer is not waited for, say which."""
    try:
        return await stage.describe()
    except Unavailable as error:
        raise Unavailable(f"{stage.address}: {error.message}", error.retry_after, reason=error.reason) from error
    except ConfigError as error:
        raise ConfigError(f"{stage.address}: {error.message}") from error
    except asyncio.CancelledError:
        logger.info("%s has not answered yet", stage.address)
        raise


async def _run(stage: AttentionLink, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
    if isinstance(hole, FollowsStages):
        hole.stage_begins(stage.address)
    return await stage.step(lane, plan, hole, legs)


def _without_head(plan: StepPlan) -> StepPlan:
    """What stages without the last layer need of a plan: nobody there looks at masks and penalties."""
    nothing: dict[str, Any] = {"sampling": None, "scoring": None, "logits": LogitsScope.NONE}
    return dataclasses.replace(plan, chunks=tuple(dataclasses.replace(chunk, **nothing) for chunk in plan.chunks))


def _going_on(plan: StepPlan, hidden_state: Any) -> StepPlan:
    """What a stage needs that goes on with a hidden state: how the first one began is of no account to it."""
    if any(chunk.embeds is not None for chunk in plan.chunks):
        plan = dataclasses.replace(
            plan, chunks=tuple(dataclasses.replace(chunk, embeds=None) for chunk in plan.chunks)
        )
    return dataclasses.replace(plan, hidden_state=hidden_state)
