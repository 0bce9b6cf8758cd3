"""Prompts are cut so that a step with decodes takes no longer than it may."""

from __future__ import annotations

import math

import pytest

from grokmoe.errors import ConfigError
from router.pages import PageLedger
from router.request import Request
from router.scheduler import Scheduler
from router.scheduler.step_budget import StepBudget
from router.sequence import Sequence
from router.step import SchedulerSettings, Step

MOST = 512


class Worker:
    """A scheduler and a worker whose steps take what `seconds` says: (decodes, other tokens) -> seconds."""

    def __init__(self, goal: float, decode: float, token: float) -> None:
        settings = SchedulerSettings(context_length=4096, max_step_tokens=MOST, step_goal=goal)
        self.scheduler = Scheduler(settings, PageLedger(1024, 16))
        self._decode, self._token = decode, token
        self.steps: list[tuple[int, int, float]] = []
        self._count = 0

    def ask(self, num_prompt: int, max_tokens: int = 1000) -> None:
        self._count += 1
        ids = tuple(self._count * 7000 + place for place in range(num_prompt))
        request = Request(request_id=str(self._count), prompt_ids=ids, max_tokens=max_tokens)
        self.scheduler.add(Sequence(request, self._count))

    def step(self) -> None:
        step = self.scheduler.schedule()
        assert step is not None
        others = step.num_tokens - step.num_decodes
        seconds = (self._decode if step.num_decodes else 0.0) + others * self._token
        self.scheduler.complete(step, [1] * sum(chunk.wants_token for chunk in step.chunks))
        self.scheduler.budget.observe(step, seconds)
        self.steps.append((step.num_decodes, others, seconds))


def streaming(goal: float, decode: float, token: float) -> Worker:
    """Four sequences that stream, then a long prompt; what was learned is learned."""
    worker = Worker(goal, decode, token)
    for _ in range(4):
        worker.ask(40)
    for _ in range(10):
        worker.step()
    worker.ask(3000)
    worker.steps.clear()
    for _ in range(6):
        worker.step()
    return worker


def test_a_prompt_beside_decodes_is_cut_to_the_goal() -> None:
    worker = streaming(goal=0.25, decode=0.05, token=0.001)
    for num_decodes, others, seconds in worker.steps:
        assert num_decodes == 4
        assert others == pytest.approx(200, abs=2)
        assert seconds == pytest.approx(0.25, abs=0.003)


def test_a_prompt_alone_has_whole_steps() -> None:
    worker = Worker(goal=0.25, decode=0.05, token=0.001)
    worker.ask(2000)
    for _ in range(3):
        worker.step()
    assert [others for _, others, _ in worker.steps] == [512, 512, 512]


def test_without_a_goal_steps_are_whole() -> None:
    worker = streaming(goal=0.0, decode=0.05, token=0.001)
    assert worker.steps[0][:2] == (4, 508)


def test_a_fast_worker_has_whole_steps() -> None:
    worker = streaming(goal=0.25, decode=0.01, token=0.0001)
    assert worker.steps[0][:2] == (4, 508)


@pytest.mark.parametrize(("decode", "token"), [(0.3, 0.001), (0.05, 0.1)])
def test_a_slow_worker_lets_no_prompt_starve(decode: float, token: float) -> None:
    worker = streaming(goal=0.25, decode=decode, token=token)
    assert {others for _, others, _ in worker.steps} == {MOST // 4 - 4}


def test_decodes_are_never_cut() -> None:
    budget = StepBudget(0.1, 16)
    worker = Worker(goal=0.1, decode=1.0, token=1.0)
    worker.ask(100)
    step = worker.scheduler.schedule()
    assert isinstance(step, Step)
    budget.observe(step, 50.0)
    assert budget.tokens(12) == 12
    assert budget.tokens(1) == 4


@pytest.mark.parametrize("goal", [-1.0, math.inf, math.nan])
def test_goals_that_cannot_be(goal: float) -> None:
    with pytest.raises(ConfigError, match="step_goal"):
        SchedulerSettings(context_length=10, step_goal=goal)
