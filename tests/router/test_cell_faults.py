"""Attention workers that fail in every way: no request is lost, no token changes, nothing waits for ever."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokmoe.errors import InternalError, Reason, Unavailable
from grokmoe.step_plan import StepPlan, StepResult
from router.attention_member import CellSettings
from router.engine import Engine
from router.generation import Generation
from router.legs import Legs
from router.probing import ProbeSettings
from router.request import SamplingSettings
from router.step_deadline import StepDeadlineSettings
from router.transport.base import AttentionLink, Hole
from router.worker_state import WorkerState
from tests import goldens
from tests.router.faulty_attention import Fault, FaultyAttention
from tests.router.tiny import (
    ExpertDouble,
    attention_link,
    golden_request,
    golden_tokens,
    serving,
    tokens_of,
    until,
)

QUICK_PROBE = ProbeSettings(first_pause=0.005, max_pause=0.02)
CARE = CellSettings(
    heartbeat=0.02,
    heartbeat_timeout=0.05,
    restart_pause=0.001,
    probe=QUICK_PROBE,
    deadline=StepDeadlineSettings(floor=0.3, ceiling=0.3),
)
PATIENT = CellSettings(heartbeat=1000.0, restart_pause=0.001, probe=QUICK_PROBE)
"""Nothing is noticed but by steps."""

ALL = [*goldens.PROMPTS]
DRAWN = SamplingSettings(temperature=1.0, top_p=0.9, seed=5)


def cared(
    links: AttentionLink | list[Any], care: CellSettings = CARE, experts: Any = None, limits: Any = None, **more: Any
) -> Any:
    """`serving` with these limits."""
    return serving(links, experts, faults={"care": care, **more}, **{"max_step_tokens": 24, **(limits or {})})


async def check_all(engine: Engine, prompts: Iterable[str] = ALL) -> None:
    """Asks for all at the same time; every answer is the golden one."""
    asked = [(prompt, engine.submit(golden_request(prompt))) for prompt in prompts]
    for prompt, generation in asked:
        assert await tokens_of(generation) == golden_tokens(prompt), prompt


async def begun(engine: Engine, *prompts: str, num_tokens: int = 1, max_tokens: int = 16) -> list[Generation]:
    """Requests that have drawn so many tokens at least."""
    generations = [engine.submit(golden_request(prompt, max_tokens=max_tokens)) for prompt in prompts]
    await until(lambda: all(each.sequences[0].num_outputs >= num_tokens for each in generations))
    return generations


class TestBugs:
    def test_a_link_that_raises_anything_fails_its_step_only(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.CRITICAL)

        async def main() -> None:
            link = FaultyAttention({0: Fault.BUG})
            async with cared(link) as engine:
                with pytest.raises(InternalError, match="ZeroDivisionError"):
                    await tokens_of(engine.submit(golden_request("len7")))
                await check_all(engine)

        asyncio.run(main())

    @pytest.mark.parametrize("where", ["schedule", "complete", "fail"])
    @pytest.mark.parametrize("num_lanes", [1, 2])
    def test_a_bug_in_the_scheduler_ends_what_it_concerns_and_the_lane_goes_on(
        self, caplog: pytest.LogCaptureFixture, where: str, num_lanes: int
    ) -> None:
        caplog.set_level(logging.CRITICAL + 1)

        async def main() -> None:
            link = FaultyAttention()
            async with cared(link, limits={"num_lanes": num_lanes}) as engine:
                scheduler, num_calls = engine.cells[0].scheduler, 0
                real = getattr(scheduler, where)

                def broken(*args: Any) -> Any:
                    nonlocal num_calls
                    num_calls += 1
                    if num_calls == 1 or where == "schedule":
                        raise KeyError("a bug")
                    return real(*args)

                generations = await begun(engine, "len7", "len33", max_tokens=64)
                setattr(scheduler, where, broken)
                if where == "fail":
                    link.faults[link.num_steps + num_lanes] = Fault.BUG
                outcomes = await asyncio.gather(*map(tokens_of, generations), return_exceptions=True)
                failed = [each for each in outcomes if isinstance(each, InternalError)]
                assert failed
                assert all(isinstance(each, InternalError | list) for each in outcomes), outcomes
                assert engine.faults.lane_restarts >= 1
                setattr(
                    engine.cells[0].scheduler, where, getattr(type(scheduler), where).__get__(engine.cells[0].scheduler)
                )
                await check_all(engine)

        asyncio.run(main())

    def test_books_that_do_not_add_up_end_all_requests_of_the_cell(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.CRITICAL + 1)

        async def main() -> None:
            async with cared(FaultyAttention(), limits={"num_lanes": 2}) as engine:
                generations = await begun(engine, "len7", "len33", max_tokens=300)
                scheduler = engine.cells[0].scheduler
                scheduler.ledger._num_references[0] += 5
                scheduler.complete = lambda *_: 1 // 0  # type: ignore[method-assign, assignment]
                for generation in generations:
                    with pytest.raises(InternalError):
                        await tokens_of(generation)
                assert engine.faults.book_errors == 1
                assert engine.cells[0].scheduler is not scheduler
                await check_all(engine)

        asyncio.run(main())


class TestNotFinite:
    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_it_is_computed_again_and_no_neighbour_notices(self, num_workers: int) -> None:
        async def main() -> None:
            links: list[Any] = [FaultyAttention({3: Fault.NAN}), attention_link()][:num_workers]
            async with cared(links, PATIENT) as engine:
                await check_all(engine)
                assert engine.faults.faulty_chunks == 1
                assert engine.faults.losses == num_workers - 1, "elsewhere, if there is an elsewhere"
                assert engine.faults.migrations == 0

        asyncio.run(main())

    def test_where_there_is_nobody_else_it_is_tried_again_and_again(self) -> None:
        async def main() -> None:
            async with cared(FaultyAttention({number: Fault.NAN for number in range(3)})) as engine:
                assert await tokens_of(engine.submit(golden_request("len1"))) == golden_tokens("len1")
                assert engine.faults.faulty_chunks == 3

        asyncio.run(main())

    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_then_it_is_an_error_of_that_request_alone(self, num_workers: int) -> None:
        async def main() -> None:
            faults = {number: Fault.NAN for number in range(4 if num_workers == 1 else 1)}
            async with cared([FaultyAttention(faults) for _ in range(num_workers)], PATIENT) as engine:
                bad = engine.submit(golden_request("len1"))
                with pytest.raises(InternalError, match="not finite"):
                    await tokens_of(bad)
                assert bad.sequences[0].output_ids == []
                await check_all(engine)

        asyncio.run(main())

    def test_a_token_of_it_never_reaches_a_client(self) -> None:
        async def main() -> None:
            async with cared([FaultyAttention(always=Fault.NAN), FaultyAttention(always=Fault.NAN)]) as engine:
                for prompt in ALL:
                    with pytest.raises(InternalError, match="not finite"):
                        await tokens_of(engine.submit(golden_request(prompt)))

        asyncio.run(main())


class TestMigrationLimit:
    def test_a_request_that_kills_every_worker_ends(self) -> None:
        async def main() -> None:
            deadly = [FaultyAttention(always=Fault.DIE), FaultyAttention(always=Fault.DIE)]
            async with cared(deadly, max_migrations=3) as engine:
                with pytest.raises(Unavailable, match="lost 4 times") as caught:
                    await tokens_of(engine.submit(golden_request("len1")))
                assert caught.value.reason is Reason.WORKER_UNAVAILABLE
                assert sum(link.num_steps for link in deadly) == 4
                assert (engine.faults.losses, engine.faults.migration_limits) == (4, 1)
                for link in deadly:
                    link.always = None
                await check_all(engine)

        asyncio.run(main())

    def test_all_candidates_of_such_a_request_end(self) -> None:
        async def main() -> None:
            link = FaultyAttention(always=Fault.DIE)
            async with cared(link, max_migrations=0) as engine:
                generation = engine.submit(golden_request("len7", n=3))
                with pytest.raises(Unavailable, match="lost 1 times"):
                    await generation.take()
                assert (engine.num_running, engine.num_waiting) == (0, 0)

        asyncio.run(main())

    def test_who_only_waited_is_not_counted(self) -> None:
        async def main() -> None:
            link = FaultyAttention({0: Fault.DIE, 1: Fault.DIE})
            async with cared(link, max_migrations=2, limits={"max_running": 1}) as engine:
                first, second = (engine.submit(golden_request(prompt)) for prompt in ("len7", "len1"))
                assert await tokens_of(first) == golden_tokens("len7")
                assert await tokens_of(second) == golden_tokens("len1")
                assert (first.sequences[0].num_migrations, second.sequences[0].num_migrations) == (2, 0)

        asyncio.run(main())

    def test_preemptions_are_not_counted(self) -> None:
        async def main() -> None:
            link = FaultyAttention(num_pages=12)
            async with cared(link, max_migrations=0) as engine:
                await check_all(engine, [*ALL, *ALL, "len33", "len33"])
                assert engine.report.num_preemptions > 0

        asyncio.run(main())


class TestHung:
    def test_a_step_that_is_not_answered_is_given_to_another_worker(self) -> None:
        async def main() -> None:
            hanging = FaultyAttention({4: Fault.HANG})
            care = CellSettings(heartbeat=1000.0, probe=QUICK_PROBE, deadline=CARE.deadline)
            async with cared([hanging, FaultyAttention()], care, [ExpertDouble()]) as engine:
                await check_all(engine, [*ALL, *ALL])
                assert hanging.num_cut_off == engine.faults.hangs == 1

        asyncio.run(main())

    def test_a_worker_that_says_nothing_is_found_by_its_silence(self) -> None:
        async def main() -> None:
            silent = FaultyAttention()
            async with cared([silent, attention_link()]) as engine:
                silent.is_up = None
                await until(lambda: engine.cells[0].state is WorkerState.SUSPECT)
                await check_all(engine)
                assert engine.faults.hangs == 1

        asyncio.run(main())

    def test_one_that_is_alone_is_waited_for(self) -> None:
        async def main() -> None:
            slow = FaultyAttention()
            async with cared(slow, CARE, [ExpertDouble()]) as engine:
                slow.is_up = None  # steps go on all the same
                slow.step = _slowed(slow.step, 0.4)  # type: ignore[method-assign]
                assert await tokens_of(engine.submit(golden_request("len1", max_tokens=2))) == golden_tokens("len1")[:2]
                assert engine.faults.losses == 0

        asyncio.run(main())


def _slowed(step: Any, seconds: float) -> Any:
    async def slow(lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
        link_is_up = step.__self__
        link_is_up.is_up, was = True, link_is_up.is_up
        try:
            await asyncio.sleep(seconds)
            return await step(lane, plan, hole, legs)  # type: ignore[no-any-return]
        finally:
            link_is_up.is_up = was

    return slow

    def test_it_is_given_up_when_another_worker_joins(self) -> None:
        async def main() -> None:
            hanging = FaultyAttention({2: Fault.HANG})
            care = CellSettings(heartbeat=1000.0, probe=QUICK_PROBE, deadline=CARE.deadline)
            async with cared(hanging, care, [ExpertDouble()]) as engine:
                generation = engine.submit(golden_request("len7"))
                await until(lambda: hanging.num_steps == 3)
                engine.add_cell(FaultyAttention())
                assert await tokens_of(generation) == golden_tokens("len7")
                assert engine.faults.hangs == 1

        asyncio.run(main())


class TestDraining:
    @pytest.mark.parametrize("num_lanes", [1, 2])
    @pytest.mark.parametrize("told_by", ["plan", "describe"])
    def test_its_sequences_move_and_nothing_is_counted(self, num_lanes: int, told_by: str) -> None:
        async def main() -> None:
            leaving, other = FaultyAttention(), FaultyAttention()
            care = PATIENT if told_by == "plan" else CARE
            async with cared([leaving, other], care, limits={"num_lanes": num_lanes}, max_migrations=0) as engine:
                asked = [(prompt, engine.submit(golden_request(prompt))) for prompt in [*ALL, *ALL]]
                await until(lambda: leaving.num_steps >= 2)
                leaving.is_draining = True
                for prompt, generation in asked:
                    assert await tokens_of(generation) == golden_tokens(prompt)
                await until(lambda: engine.cells[0].state is WorkerState.DRAINING)
                assert engine.faults.moves + engine.faults.migrations >= 0 == engine.faults.losses
                num_steps = leaving.num_steps
                await check_all(engine)
                assert leaving.num_steps == num_steps, "who drains gets no work"
                leaving.restart()
                await until(lambda: engine.cells[0].state is WorkerState.READY)

        asyncio.run(main())

    def test_without_another_they_wait_for_one(self) -> None:
        async def main() -> None:
            leaving = FaultyAttention()
            async with cared(leaving, max_migrations=0) as engine:
                generations = await begun(engine, "len7", "len33")
                leaving.is_draining = True
                await until(lambda: engine.cells[0].state is WorkerState.DRAINING)
                assert not engine.is_serving
                waiting = engine.submit(golden_request("len2"))
                engine.add_cell(FaultyAttention(address="new"))
                for prompt, generation in zip(("len7", "len33", "len2"), [*generations, waiting], strict=True):
                    assert await tokens_of(generation) == golden_tokens(prompt)
                assert engine.faults.losses == 0
                assert engine.is_serving

        asyncio.run(main())

    def test_without_another_they_wait_for_its_return(self) -> None:
        async def main() -> None:
            leaving = FaultyAttention()
            async with cared(leaving, max_migrations=0) as engine:
                (generation,) = await begun(engine, "len33")
                leaving.is_draining = True
                await until(lambda: engine.cells[0].state is WorkerState.DRAINING)
                leaving.is_up = False
                await until(lambda: engine.cells[0].state is WorkerState.SUSPECT)
                leaving.restart()
                leaving.is_up = True
                assert await tokens_of(generation) == golden_tokens("len33")

        asyncio.run(main())


class TestMembership:
    def test_a_worker_more_is_used(self) -> None:
        async def main() -> None:
            async with cared(attention_link()) as engine:
                new = FaultyAttention()
                cell = engine.add_cell(new)
                assert (cell.index, cell.state) == (1, WorkerState.JOINING)
                await until(lambda: cell.state is WorkerState.READY)
                await check_all(engine, [*ALL, *ALL])
                assert new.num_steps > 0

        asyncio.run(main())

    def test_one_that_leaves_loses_nothing(self) -> None:
        async def main() -> None:
            leaving = FaultyAttention()
            async with cared([leaving, attention_link()], max_migrations=0) as engine:
                asked = [(prompt, engine.submit(golden_request(prompt))) for prompt in [*ALL, *ALL]]
                await until(lambda: leaving.num_steps >= 2)
                cell = engine.cells[0]
                await asyncio.wait_for(engine.remove_cell(cell), 30)
                assert [each.index for each in engine.cells] == [1]
                assert leaving.num_closed == 1
                for prompt, generation in asked:
                    assert await tokens_of(generation) == golden_tokens(prompt)
                assert engine.add_cell(attention_link()).index == 2, "an index is never used twice"

        asyncio.run(main())

    def test_the_last_one_goes_on_until_there_is_another(self) -> None:
        async def main() -> None:
            async with cared(FaultyAttention()) as engine:
                (generation,) = await begun(engine, "len33", max_tokens=400)
                removal = engine.remove_cell(engine.cells[0])
                assert removal is engine.remove_cell(engine.cells[0])
                await check_all(engine)
                assert not removal.done()
                new = FaultyAttention()
                engine.add_cell(new)
                await asyncio.wait_for(removal, 30)
                num_outputs = generation.sequences[0].num_outputs
                await until(lambda: generation.sequences[0].num_outputs > num_outputs)
                assert new.num_steps > 0
                engine.cancel(generation)

        asyncio.run(main())

    def test_one_that_is_lost_can_leave(self) -> None:
        async def main() -> None:
            lost = FaultyAttention()
            async with cared([lost, attention_link()]) as engine:
                lost.is_up = False
                await until(lambda: engine.cells[0].state is WorkerState.SUSPECT)
                await asyncio.wait_for(engine.remove_cell(engine.cells[0]), 30)
                await check_all(engine)

        asyncio.run(main())

    def test_serving_is_told_once_per_change(self) -> None:
        async def main() -> None:
            link, expert = FaultyAttention(), ExpertDouble()
            told: list[bool] = []
            async with cared(link, CARE, [expert]) as engine:
                assert engine.is_serving
                engine.on_serving.append(told.append)
                link.is_up = False
                await until(lambda: told == [False])
                link.is_up = True
                await until(lambda: told == [False, True])
                assert engine.pool is not None
                expert.is_up = False
                generation = engine.submit(golden_request("len1"))
                await until(lambda: told == [False, True, False])
                expert.is_up = True
                assert await tokens_of(generation) == golden_tokens("len1")
                assert told == [False, True, False, True]

        asyncio.run(main())

    def test_sequences_that_wait_for_one_worker_go_to_the_first_that_is_back(self) -> None:
        async def main() -> None:
            links = [FaultyAttention(), FaultyAttention()]
            async with cared(links) as engine:
                generations = await begun(engine, "len7", "len33")
                for link in links:
                    link.is_up = False
                await until(lambda: all(cell.state is WorkerState.SUSPECT for cell in engine.cells))
                links[1].restart()
                links[1].is_up = True
                for prompt, generation in zip(("len7", "len33"), generations, strict=True):
                    assert await tokens_of(generation) == golden_tokens(prompt)

        asyncio.run(main())


class TestNobodyWaits:
    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_a_step_that_nobody_wants_any_more_is_cut_off(self, num_workers: int) -> None:
        async def main() -> None:
            links = [FaultyAttention(always=Fault.HANG) for _ in range(num_workers)]
            async with cared(links, PATIENT) as engine:
                generations = [engine.submit(golden_request("len7", n=2)) for _ in links]
                await until(lambda: all(link.num_steps for link in links))
                for generation in generations:
                    engine.cancel(generation)
                await until(lambda: all(link.num_cut_off for link in links))
                for link in links:
                    link.always = None
                await check_all(engine)
                assert engine.faults.abandoned_steps == num_workers
                assert engine.faults.losses == 0

        asyncio.run(main())

    def test_a_step_that_somebody_wants_goes_on(self) -> None:
        async def main() -> None:
            async with cared(FaultyAttention(), CARE, [ExpertDouble()]) as engine:
                stays, leaves = await begun(engine, "len7", "len33")
                engine.cancel(leaves)
                assert await tokens_of(stays) == golden_tokens("len7")
                assert engine.faults.abandoned_steps == 0

        asyncio.run(main())

    def test_a_step_that_waits_for_an_expert_frees_its_lane(self) -> None:
        async def main() -> None:
            expert = ExpertDouble()
            async with cared(attention_link(), PATIENT, [expert]) as engine:
                await check_all(engine, ["len1"])
                expert.is_up = False
                generation = engine.submit(golden_request("len7"))
                await until(lambda: engine.num_running == 1)
                engine.cancel(generation)
                await until(lambda: engine.cells[0].scheduler.ledger.num_used == 0)
                expert.is_up = True
                await check_all(engine)

        asyncio.run(main())


def test_books_are_checked_while_idle(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with cared(attention_link(), PATIENT, check_interval=0.01) as engine:
            await check_all(engine, ["len7"])
            await asyncio.sleep(0)
            assert engine.faults.book_errors == 0
            ledger = engine.cells[0].scheduler.ledger
            page_id = ledger._free.pop()
            await until(lambda: engine.faults.book_errors > 0)
            ledger._free.append(page_id)

    with caplog.at_level(logging.CRITICAL):
        asyncio.run(main())
    assert "an invariant does not hold" in caplog.text


FAULTS = st.dictionaries(
    st.integers(0, 40),
    st.sampled_from([Fault.DIE, Fault.DROP, Fault.LEASED, Fault.HANG, Fault.DRAIN, Fault.NAN]),
    max_size=5,
)


@settings(max_examples=8, deadline=None)
@given(first=FAULTS, second=FAULTS, num_lanes=st.integers(1, 2), num_pages=st.sampled_from([16, 64]))
def test_whatever_happens_the_tokens_are_those_of_the_undisturbed_run(
    first: dict[int, Fault], second: dict[int, Fault], num_lanes: int, num_pages: int
) -> None:
    async def main() -> None:
        links = [FaultyAttention(faults, num_pages=num_pages) for faults in (first, second)]
        async with cared(links, CARE, [ExpertDouble()], {"num_lanes": num_lanes}, max_migrations=50) as engine:
            expected = [(golden_request(prompt), golden_tokens(prompt)) for prompt in [*ALL, *ALL]]
            expected.append((golden_request("len7", sampling=DRAWN), undisturbed()))

            async def check(generation: Generation, tokens: list[int]) -> None:
                try:
                    assert await tokens_of(generation) == tokens, generation.request.request_id
                except InternalError:
                    assert generation.sequences[0].num_faults >= 2

            await asyncio.gather(*(check(engine.submit(request), tokens) for request, tokens in expected))
            assert engine.num_running == engine.num_waiting == 0
            for cell in engine.cells:
                assert cell.load == 0

    asyncio.run(main())


_UNDISTURBED: list[int] = []


def undisturbed() -> list[int]:
    """What the request that draws gets when nothing happens."""
    return _UNDISTURBED


@pytest.fixture(scope="module", autouse=True)
def _draw_undisturbed() -> None:
    async def main() -> None:
        async with serving(attention_link()) as engine:
            _UNDISTURBED[:] = await tokens_of(engine.submit(golden_request("len7", sampling=DRAWN)))

    asyncio.run(main())
