"""A step in flight and how it is cut off."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from grokmoe.step_plan import StepResult
from router.step_watch import StepAbandoned, StepHung, StepWatch

ROWS = torch.zeros(1, 2)
RESULT = StepResult((1,))


class SlowHole:
    is_local = False

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds

    async def fill(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        await asyncio.sleep(self._seconds)
        return x_TD

    def fill_now(self, layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        raise AssertionError


class LocalHole(SlowHole):
    is_local = True


def step_of(*seconds: float) -> Any:
    """A worker that takes so long before each of its answers; all but the last are MoE inputs."""

    async def call(hole: Any) -> StepResult:
        for layer, each in enumerate(seconds):
            await asyncio.sleep(each)
            if layer < len(seconds) - 1:
                await hole.fill(layer, ROWS)
        return RESULT

    return call


def test_every_answer_is_timed_and_the_hole_is_not() -> None:
    async def main() -> None:
        times: list[float] = []
        watch = StepWatch(lambda: 0.5, times.append)
        assert await watch.run(step_of(0.02, 0.0, 0.02), SlowHole(0.6)) is RESULT
        assert len(times) == 3
        assert times[0] >= 0.02 <= times[2]
        assert max(times) < 0.5

    asyncio.run(main())


@pytest.mark.parametrize("seconds", [(9.0,), (0.0, 9.0), (0.0, 0.0, 9.0)])
def test_an_answer_that_takes_too_long_is_not_waited_for(seconds: tuple[float, ...]) -> None:
    async def main() -> None:
        with pytest.raises(StepHung, match=r"0\.05 s"):
            async with asyncio.timeout(5):
                await StepWatch(lambda: 0.05, lambda _: None).run(step_of(*seconds), SlowHole())

    asyncio.run(main())


def test_an_allowance_that_comes_later_counts_from_the_question() -> None:
    async def main() -> None:
        allowed: list[float | None] = [None]
        watch = StepWatch(lambda: allowed[0], lambda _: None)
        running = asyncio.ensure_future(watch.run(step_of(9.0), SlowHole()))
        await asyncio.sleep(0.05)
        watch.rearm()
        await asyncio.sleep(0)
        assert not running.done()
        allowed[0] = 0.01
        watch.rearm()
        with pytest.raises(StepHung):
            async with asyncio.timeout(5):
                await running

    asyncio.run(main())


@pytest.mark.parametrize("hole", [SlowHole(), SlowHole(9.0), LocalHole()], ids=["worker", "hole", "local"])
def test_abandoned_it_ends_whatever_it_waits_for(hole: SlowHole) -> None:
    async def main() -> None:
        watch = StepWatch(lambda: 9.0, lambda _: None)
        running = asyncio.ensure_future(watch.run(step_of(0.0, 9.0), hole))
        await asyncio.sleep(0.02)
        watch.abandon()
        watch.abandon()
        with pytest.raises(StepAbandoned):
            async with asyncio.timeout(5):
                await running
        watch.abandon()

    asyncio.run(main())


def test_abandoned_before_it_has_begun() -> None:
    async def main() -> None:
        watch = StepWatch(lambda: None, lambda _: None)
        watch.abandon()
        with pytest.raises(StepAbandoned):
            await watch.run(step_of(0.0), SlowHole())

    asyncio.run(main())


def test_a_time_out_of_the_call_itself_is_not_taken_for_a_limit() -> None:
    async def main() -> None:
        async def call(hole: Any) -> StepResult:
            raise TimeoutError("mine")

        with pytest.raises(TimeoutError, match="mine"):
            await StepWatch(lambda: 9.0, lambda _: None).run(call, SlowHole())

    asyncio.run(main())


def test_who_cancels_the_task_is_obeyed() -> None:
    async def main() -> None:
        running = asyncio.ensure_future(StepWatch(lambda: 9.0, lambda _: None).run(step_of(9.0), SlowHole()))
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(main())
