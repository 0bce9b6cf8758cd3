"""Stages of pipelines that fail in every way: what they computed is computed again, by another pipeline or when the
stage is back, and the tokens are those of the undisturbed run."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grokmoe.errors import InternalError, Unavailable
from grokmoe.step_plan import StepPlan, StepResult
from router.generation import Generation
from router.legs import Legs
from router.transport.base import Hole, StepNotBegun
from router.worker_state import WorkerState
from tests.router.faulty_attention import Fault, FaultyAttention
from tests.router.pipelines import SPLITS, faulty_stages, pipeline
from tests.router.test_cell_faults import ALL, CARE, PATIENT, begun, cared, check_all
from tests.router.tiny import ExpertDouble, attention_link, golden_request, golden_tokens, tokens_of, until

CUTS = (0, 1, 2, 3)
LOSSES = [Fault.DIE, Fault.DROP, Fault.LEASED]


class TestLoss:
    @pytest.mark.parametrize("fault", LOSSES)
    @pytest.mark.parametrize("stage", [0, 1, 2])
    @pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "with another"])
    def test_any_stage_in_mid_decode(
        self, caplog: pytest.LogCaptureFixture, fault: Fault, stage: int, is_alone: bool
    ) -> None:
        """Alone it waits for the stage's return."""

        async def main() -> None:
            stages = faulty_stages(CUTS, {stage: {5: fault}}, "first-")
            links = [pipeline(*stages)]
            if not is_alone:
                links.append(pipeline(*faulty_stages((0, 2, 3), name="second-")))
            async with cared(links, experts=[ExpertDouble()]) as engine:
                await check_all(engine, ALL * 3)
                assert engine.faults.losses == 1
                assert engine.faults.migrations >= int(fault is not Fault.DROP or is_alone)
                await until(lambda: engine.cells[0].state is WorkerState.READY)
                await check_all(engine)

        asyncio.run(main())
        assert f"is lost: first-{'abc'[stage]}: " in caplog.text, "the log says which stage"

    def test_a_stage_that_was_restarted_between_two_steps(self) -> None:
        """The others have their pages still, and none of them is used."""

        async def main() -> None:
            stages = faulty_stages(CUTS)
            async with cared(pipeline(*stages), PATIENT) as engine:
                (generation,) = await begun(engine, "len33")
                before = engine.cells[0].info
                stages[1].restart()
                assert await tokens_of(generation) == golden_tokens("len33")
                after = engine.cells[0].info
                assert before is not None
                assert after is not None
                changed = [
                    old != new
                    for old, new in zip(before.incarnation.split("+"), after.incarnation.split("+"), strict=True)
                ]
                assert changed == [False, True, False]
                assert engine.faults.losses == 1

        asyncio.run(main())

    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_a_stage_that_is_gone_while_nothing_is_computed(self, stage: int) -> None:
        async def main() -> None:
            stages = faulty_stages(CUTS)
            async with cared(pipeline(*stages)) as engine:
                await check_all(engine, ["len7"])
                stages[stage].is_up = False
                await until(lambda: engine.cells[0].state is WorkerState.SUSPECT)
                assert not engine.is_serving
                waiting = engine.submit(golden_request("len2"))
                stages[stage].restart()
                stages[stage].is_up = True
                assert await tokens_of(waiting) == golden_tokens("len2")
                assert engine.faults.migrations == 0, "nobody was in a step"

        asyncio.run(main())

    def test_a_stage_that_comes_back_with_other_layers_is_not_used(self, caplog: pytest.LogCaptureFixture) -> None:
        async def main() -> None:
            stages = faulty_stages((0, 1, 3))
            async with cared(pipeline(*stages)) as engine:
                (generation,) = await begun(engine, "len7")
                stages[1]._sizes["held"] = range(2, 3)
                stages[1].restart()
                await until(lambda: "leave layers out: layers 0-0 at a, 2-2 at b" in caplog.text)
                stages[1]._sizes["held"] = range(1, 3)
                stages[1].restart()
                assert await tokens_of(generation) == golden_tokens("len7")

        asyncio.run(main())


class Held(FaultyAttention):
    """A stage that keeps steps until the test ends them, from when it says so."""

    holds = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ends: list[asyncio.Future[None]] = []
        self.plans: list[StepPlan] = []

    async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
        if self.holds:
            self.plans.append(plan)
            self.ends.append(asyncio.get_running_loop().create_future())
            await self.ends[-1]
        return await super().step(lane, plan, hole, legs)


def held_stages() -> list[Held]:
    return [Held(address=name, held=held) for name, held in (("a", range(1)), ("b", range(1, 3)))]


class TestBlame:
    """Losing a stage counts against the sequences that were in it, since one of them may have killed it."""

    @pytest.mark.parametrize("error", [Unavailable, StepNotBegun])
    def test_of_two_steps_in_flight(self, error: type[Unavailable]) -> None:
        async def main() -> None:
            stages, prompts = held_stages(), ("len33", "len70")
            async with cared(pipeline(*stages), PATIENT, [ExpertDouble()], {"max_step_tokens": 33}) as engine:
                for stage in stages:
                    stage.holds = True
                in_b, in_a = generations = [engine.submit(golden_request(prompt)) for prompt in prompts]
                await until(lambda: len(stages[0].ends) == 2)
                stages[0].ends[0].set_result(None)  # the first step goes on to the second stage
                await until(lambda: len(stages[1].ends) == 1)
                for stage in stages:
                    stage.holds = False
                stages[1].ends[0].set_exception(error("gone"))
                await until(lambda: engine.faults.losses == 1)
                assert in_b.sequences[0].num_migrations == int(error is Unavailable)
                assert in_a.sequences[0].num_migrations == 0, "it has not met the stage that is lost"
                for generation, prompt in zip(generations, prompts, strict=True):
                    assert await tokens_of(generation) == golden_tokens(prompt)

        asyncio.run(main())


class TestHang:
    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_it_is_cut_off_where_another_pipeline_can_take_over(
        self, caplog: pytest.LogCaptureFixture, stage: int
    ) -> None:
        async def main() -> None:
            stages = faulty_stages(CUTS, {stage: {5: Fault.HANG}})
            links = [pipeline(*stages), pipeline(*faulty_stages((0, 1, 3), name="other-"))]
            care = dataclasses.replace(PATIENT, deadline=CARE.deadline)
            async with cared(links, care, [ExpertDouble()]) as engine:
                engine.cells[0].pace.observe = lambda *_: False  # type: ignore[method-assign]
                await check_all(engine, ALL * 3)
                assert engine.faults.hangs == 1
            assert stages[stage].num_cut_off == 1

        caplog.set_level(logging.WARNING)
        asyncio.run(main())
        assert f"is lost: {'abc'[stage]}: no answer to a step for " in caplog.text

    def test_alone_it_is_waited_for(self) -> None:
        async def main() -> None:
            stages = held_stages()
            async with cared(pipeline(*stages), experts=[ExpertDouble()]) as engine:
                stages[1].holds = True
                generation = engine.submit(golden_request("len7"))
                await until(lambda: len(stages[1].ends) == 1)
                await asyncio.sleep(0.5)  # beyond all limits of these settings
                stages[1].holds = False
                stages[1].ends[0].set_result(None)
                assert await tokens_of(generation) == golden_tokens("len7")
                assert engine.faults.losses == 0

        asyncio.run(main())

    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_a_stage_that_is_silent_while_nothing_is_computed(
        self, caplog: pytest.LogCaptureFixture, stage: int
    ) -> None:
        caplog.set_level(logging.INFO)

        async def main() -> None:
            stages = faulty_stages(CUTS)
            async with cared([pipeline(*stages), attention_link()]) as engine:
                stages[stage].is_up = None
                await until(lambda: engine.cells[0].state is WorkerState.SUSPECT)
                assert engine.faults.hangs == 1
                stages[stage].is_up = True

        asyncio.run(main())
        assert f"{'abc'[stage]} has not answered yet" in caplog.text

    def test_each_stage_is_timed_apart(self) -> None:
        """What one takes at the end of its layers and the next at the beginning of its own are two answers."""

        async def main() -> None:
            async with cared(pipeline(*faulty_stages(CUTS)), experts=[ExpertDouble()]) as engine:
                seen: list[float] = []
                engine.cells[0]._tempo.observe = lambda work, seconds: (seen.append(seconds), False)[1]  # type: ignore[method-assign, func-returns-value]
                await tokens_of(engine.submit(golden_request("len7", 1)))
                assert len(seen) == 3 * 2, "per stage one before its layer's experts, and one after"

        asyncio.run(main())


class TestDrain:
    @pytest.mark.parametrize("stage", [0, 1, 2])
    @pytest.mark.parametrize("told_by", ["plan", "describe"])
    def test_its_sequences_move_and_nothing_is_counted(self, stage: int, told_by: str) -> None:
        async def main() -> None:
            stages = faulty_stages(CUTS)
            links = [pipeline(*stages), pipeline(*faulty_stages((0, 2, 3), name="other-"))]
            care = PATIENT if told_by == "plan" else CARE
            async with cared(links, care, max_migrations=0) as engine:
                asked = [(prompt, engine.submit(golden_request(prompt))) for prompt in [*ALL, *ALL]]
                await until(lambda: stages[2].num_steps >= 2)
                stages[stage].is_draining = True
                for prompt, generation in asked:
                    assert await tokens_of(generation) == golden_tokens(prompt)
                await until(lambda: engine.cells[0].state is WorkerState.DRAINING)
                assert engine.faults.losses == 0
                num_steps = stages[2].num_steps
                await check_all(engine)
                assert stages[2].num_steps == num_steps, "who drains gets no work"
                stages[stage].restart()
                await until(lambda: engine.cells[0].state is WorkerState.READY)

        asyncio.run(main())


class TestNotFinite:
    @pytest.mark.parametrize("stage", [0, 1, 2])
    def test_what_a_stage_says_of_a_chunk_holds_for_the_step(self, stage: int) -> None:
        async def main() -> None:
            links = [
                pipeline(*faulty_stages(CUTS, {stage: {3: Fault.NAN}})),
                pipeline(*faulty_stages(CUTS, name="other-")),
            ]
            async with cared(links) as engine:
                await check_all(engine, ALL * 2)
                assert engine.faults.faulty_chunks == 1

        asyncio.run(main())

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf])
    def test_a_hidden_state_that_is_spoilt_on_its_way(self, poison: float, caplog: pytest.LogCaptureFixture) -> None:
        """Nobody has said so: the next stage finds it."""

        class Spoiling(FaultyAttention):
            num_spoilt = 0

            async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
                result = await super().step(lane, plan, hole, legs)
                if self.num_steps == 3 and not self.num_spoilt:
                    self.num_spoilt += 1
                    hidden_TD = result.hidden_state.clone()
                    hidden_TD[-1, 7] = poison
                    return dataclasses.replace(result, hidden_state=hidden_TD)
                return result

        async def main() -> None:
            stages = faulty_stages(CUTS)
            stages[0] = Spoiling(address="a", held=range(1))
            async with cared(pipeline(*stages)) as engine:
                await check_all(engine, ALL * 2)
                assert engine.faults.faulty_chunks == 1

        asyncio.run(main())
        assert "b: 1 chunks of a step are not finite" in caplog.text


def test_a_step_that_nobody_wants_ends_in_the_stage_where_it_is() -> None:
    async def main() -> None:
        stages = held_stages()
        async with cared(pipeline(*stages), experts=[ExpertDouble()]) as engine:
            stages[1].holds = True
            generation = engine.submit(golden_request("len7"))
            await until(lambda: len(stages[1].ends) == 1)
            engine.cancel(generation)
            await until(lambda: stages[1].ends[0].cancelled())
            assert engine.faults.abandoned_steps == 1
            stages[1].holds = False
            await check_all(engine)

    asyncio.run(main())


FAULTS = st.dictionaries(
    st.integers(0, 40),
    st.sampled_from([Fault.DIE, Fault.DROP, Fault.LEASED, Fault.HANG, Fault.DRAIN, Fault.NAN]),
    max_size=3,
)


@settings(max_examples=8, deadline=None)
@given(
    faults=st.lists(FAULTS, min_size=6, max_size=6),
    cuts=st.tuples(st.sampled_from(SPLITS), st.sampled_from(SPLITS)),
    num_lanes=st.integers(1, 4),
    num_pages=st.sampled_from([16, 64]),
)
def test_whatever_happens_the_tokens_are_those_of_the_undisturbed_run(
    faults: list[dict[int, Fault]], cuts: tuple[Any, Any], num_lanes: int, num_pages: int
) -> None:
    async def main() -> None:
        links = [
            pipeline(
                *faulty_stages(cuts[number], dict(enumerate(faults[3 * number :])), f"{number}", num_pages=num_pages)
            )
            for number in range(2)
        ]
        async with cared(links, CARE, [ExpertDouble()], {"num_lanes": num_lanes}, max_migrations=50) as engine:

            async def check(generation: Generation, tokens: list[int]) -> None:
                try:
                    assert await tokens_of(generation) == tokens, generation.request.request_id
                except InternalError:
                    assert generation.sequences[0].num_faults >= 2

            asked = [(engine.submit(golden_request(prompt)), golden_tokens(prompt)) for prompt in [*ALL, *ALL]]
            await asyncio.gather(*(check(*each) for each in asked))
            assert engine.num_running == engine.num_waiting == 0

    asyncio.run(main())
