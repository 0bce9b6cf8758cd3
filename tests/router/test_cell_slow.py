"""An attention worker that is slow beside the others is avoided and left, and used where nobody is better."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from grokmoe.step_plan import StepPlan, StepResult
from router.attention_member import CellSettings
from router.legs import Legs
from router.step_deadline import StepDeadlineSettings
from router.step_pace import Pace, StepPaceSettings
from router.transport.base import Hole
from router.worker_state import WorkerState
from tests.router.faulty_attention import FaultyAttention
from tests.router.test_cell_faults import ALL, QUICK_PROBE, begun, cared, check_all
from tests.router.tiny import ExpertDouble, golden_request, golden_tokens, tokens_of, until


class SlowAttention(FaultyAttention):
    """`delay`: seconds before each of its answers; it says at once how it is."""

    delay = 0.0

    async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
        return await super().step(lane, plan, _SlowHole(hole, self), legs)


class _SlowHole:
    """A worker that takes long to reach a layer."""

    is_local = False

    def __init__(self, hole: Any, worker: SlowAttention) -> None:
        self._hole, self._worker = hole, worker

    async def fill(self, layer: int, x_TD: Any) -> Any:
        if self._worker.delay:
            await asyncio.sleep(self._worker.delay)
        return await self._hole.fill(layer, x_TD)

    def fill_now(self, layer: int, x_TD: Any) -> Any:
        raise AssertionError


def care(floor: float = 5.0, **pace: float) -> CellSettings:
    """Nothing hangs that answers within `floor` seconds."""
    deadline = StepDeadlineSettings(floor=floor, first_floor=max(floor, 2.0))
    limits = StepPaceSettings(**{"first_pause": 1000.0, "max_pause": 1000.0, "margin": 0.01, **pace})
    return CellSettings(heartbeat=1000.0, probe=QUICK_PROBE, deadline=deadline, pace=limits)


def two_of(links: list[SlowAttention], care: CellSettings, **more: Any) -> Any:
    return cared(list(links), care, [ExpertDouble()], **more)


async def warm(engine: Any) -> None:
    """Both workers have shown what they take."""
    await check_all(engine, [*ALL, *ALL])
    assert all(cell.times.usual(1 << 11) is not None for cell in engine.cells)


def test_its_sequences_leave_and_nothing_is_counted_against_them() -> None:
    async def main() -> None:
        slow, quick = SlowAttention(), SlowAttention()
        async with two_of([slow, quick], care(), max_migrations=0) as engine:
            await warm(engine)
            generations = await begun(engine, *ALL)
            slow.delay = 0.1
            for prompt, generation in zip(ALL, generations, strict=True):
                assert await tokens_of(generation) == golden_tokens(prompt)
            cell = engine.cells[0]
            assert (cell.pace.pace, cell.state) == (Pace.SLOW, WorkerState.READY)
            assert (engine.faults.losses, engine.faults.migrations) == (0, 0)
            assert engine.faults.moves > 0
            assert engine.faults.abandoned_steps == 0, "somebody wanted it"

    asyncio.run(main())


def test_no_new_sequence_goes_to_it_while_another_has_room() -> None:
    async def main() -> None:
        slow, quick = SlowAttention(), SlowAttention()
        async with two_of([slow, quick], care(), limits={"max_running": 2}) as engine:
            await warm(engine)
            engine.cells[0].pace.alarm()
            num_steps = slow.num_steps
            await check_all(engine, ["len7", "len1"])
            assert slow.num_steps == num_steps
            await check_all(engine, [*ALL, *ALL])
            assert slow.num_steps > num_steps, "who is full is no better place"

    asyncio.run(main())


def test_one_that_is_late_but_alive_is_slow_and_not_hung() -> None:
    async def main() -> None:
        slow, quick = SlowAttention(), SlowAttention()
        async with two_of([slow, quick], care(floor=0.2), max_migrations=0) as engine:
            await warm(engine)
            generations = await begun(engine, *ALL, max_tokens=200)
            slow.delay = 1.5
            begin = time.monotonic()
            await until(lambda: engine.cells[0].pace.pace is Pace.SLOW)
            assert time.monotonic() - begin < 1.5
            await until(lambda: engine.cells[0].state is WorkerState.READY)
            assert [each.sequences[0].num_migrations for each in generations] == [0] * len(generations)
            for prompt, generation in zip(ALL, generations, strict=True):
                engine.cancel(generation)
                drawn = generation.sequences[0].output_ids[:16]
                assert drawn == golden_tokens(prompt)[: len(drawn)]

    asyncio.run(main())


def test_where_all_are_as_slow_nobody_is_left() -> None:
    async def main() -> None:
        links = [SlowAttention(), SlowAttention()]
        async with two_of(links, care()) as engine:
            for link in links:
                link.delay = 0.03
            await warm(engine)
            assert [cell.pace.pace for cell in engine.cells] == [Pace.EVEN] * 2
            assert engine.faults.moves == 0

    asyncio.run(main())


def test_alone_it_is_used() -> None:
    async def main() -> None:
        slow = SlowAttention()
        async with two_of([slow], care(floor=0.05)) as engine:
            slow.delay = 0.1
            answer = await tokens_of(engine.submit(golden_request("len7", max_tokens=3)))
            assert answer == golden_tokens("len7")[:3]
            assert engine.faults.losses == 0

    asyncio.run(main())


def test_it_is_tried_with_one_sequence_and_taken_back() -> None:
    async def main() -> None:
        was_slow, quick = SlowAttention(), SlowAttention()
        async with two_of([was_slow, quick], care(first_pause=0.05, trial_answers=8.0)) as engine:
            await warm(engine)
            cell = engine.cells[0]
            cell.pace.alarm()
            await until(lambda: cell.pace.pace is Pace.TRIAL)
            generations = [engine.submit(golden_request(prompt)) for prompt in ALL]
            assert cell.load == 1
            for prompt, generation in zip(ALL, generations, strict=True):
                assert await tokens_of(generation) == golden_tokens(prompt)
            assert cell.pace.pace is Pace.EVEN

    asyncio.run(main())
