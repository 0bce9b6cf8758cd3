"""Stages that make one attention worker: what they are together, how a step goes through, several steps at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from typing import Any

import pytest
import torch

from grokmoe.errors import ConfigError, FailedPrecondition, Reason, Unavailable
from grokmoe.step_plan import GREEDY, LogitsScope, SequenceChunk, StepPlan, StepResult, TokenScoring
from router.legs import Legs
from router.transport.base import AttentionInfo, Hole, PipelineStage
from router.transport.pipeline import PipelineLink, compose
from tests import goldens
from tests.router.faulty_attention import FaultyAttention
from tests.router.pipelines import SPLITS, faulty_stages, pipeline
from tests.router.test_cell_faults import ALL, cared, check_all
from tests.router.tiny import CONFIG, ExpertDouble, attention_link, golden_request, golden_tokens, serving, tokens_of

INFO = AttentionInfo(
    config_hash="hash",
    incarnation="one",
    dtype=torch.float32,
    hidden_size=4,
    layer_begin=0,
    layer_end=2,
    num_pages=10,
    page_size=8,
    max_step_tokens=100,
    device="cpu",
)


def stage(address: str, begin: int, end: int, **changes: Any) -> PipelineStage:
    return PipelineStage(address, dataclasses.replace(INFO, layer_begin=begin, layer_end=end, **changes))


class TestCompose:
    def test_what_several_are_together(self) -> None:
        stages = [
            stage("b", 0, 1, num_pages=30),
            stage("a", 1, 4, incarnation="two", max_step_tokens=50, device="cuda:0", num_ranks=8),
            stage("c", 4, 6, incarnation="three", num_pages=9, is_draining=True),
        ]
        assert compose(stages) == dataclasses.replace(
            INFO,
            incarnation="one+two+three",
            layer_end=6,
            num_pages=9,
            max_step_tokens=50,
            device="cpu+cuda:0 x 8",
            is_draining=True,
            stages=tuple(stages),
        )

    @pytest.mark.parametrize(
        ("stages", "words"),
        [
            ([stage("a", 0, 2), stage("b", 3, 5)], "leave layers out: layers 0-1 at a, 3-4 at b"),
            ([stage("a", 0, 3), stage("b", 2, 5)], "overlap: layers 0-2 at a, 2-4 at b"),
            ([stage("a", 0, 3), stage("b", 0, 3)], "overlap: layers 0-2 at a, 0-2 at b"),
            ([stage("a", 0, 2), stage("b", 2, 5, config_hash="x")], "b has config_hash x, a has hash"),
            ([stage("a", 0, 2), stage("b", 2, 5, dtype=torch.bfloat16)], "b has dtype torch.bfloat16, a has"),
            ([stage("a", 0, 2), stage("b", 2, 5, page_size=4)], "b has page_size 4, a has 8"),
        ],
    )
    def test_what_cannot_be_together(self, stages: list[PipelineStage], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            compose(stages)


class TestDescribe:
    def test_the_order_of_the_layers_is_found(self) -> None:
        async def main() -> None:
            stages = faulty_stages((0, 1, 2, 3), num_pages=40)
            stages[1]._sizes["num_pages"] = 30
            stages[1].restart()
            for order in itertools.permutations(stages):
                info = await PipelineLink(order).describe()
                assert [each.address for each in info.stages] == ["a", "b", "c"]
                assert (info.layer_begin, info.layer_end, info.num_pages) == (0, 3, 30)
                assert info.incarnation == "+".join(each.incarnations[-1] for each in stages)

        asyncio.run(main())

    @pytest.mark.parametrize(("cuts", "held"), [((1, 2, 3), "1-2"), ((0, 1, 2), "0-1")])
    def test_a_pipeline_that_lacks_its_ends_is_refused(self, cuts: tuple[int, ...], held: str) -> None:
        async def main() -> None:
            with pytest.raises(ConfigError, match=rf"at b\+a holds layers {held}, not all of 0-2"):
                async with serving(pipeline(*faulty_stages(cuts))):
                    pass

        asyncio.run(main())

    def test_a_stage_alone_is_refused(self) -> None:
        async def main() -> None:
            with pytest.raises(ConfigError, match="attention worker 0 at a holds layers 0-0, not all of 0-2"):
                async with serving(faulty_stages((0, 1, 3))[0]):
                    pass

        asyncio.run(main())

    @pytest.mark.parametrize("away", [0, 1, 2])
    def test_one_that_is_away_is_named_and_the_others_keep_their_lease(self, away: int) -> None:
        async def main() -> None:
            stages = faulty_stages((0, 1, 2, 3))
            stages[away].is_up = False
            with pytest.raises(Unavailable, match=f"^{'abc'[away]}: gone"):
                await pipeline(*stages).describe()
            asked = [len(each.incarnations) for each in stages]
            # The first is asked before all others: who has its lease gets theirs.
            assert asked == ([0, 0, 0] if away == 0 else [int(number != away) for number in range(3)])

        asyncio.run(main())


class Recording(FaultyAttention):
    """Keeps the plans that it got, and what it answered."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.plans: list[StepPlan] = []
        self.results: list[StepResult] = []

    async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
        self.plans.append(plan)
        self.results.append(await super().step(lane, plan, hole, legs))
        return self.results[-1]


def recording_stages(cuts: tuple[int, ...]) -> list[Recording]:
    pairs = enumerate(itertools.pairwise(cuts))
    return [Recording(address="abc"[number], held=range(begin, end)) for number, (begin, end) in pairs]


class TestStep:
    @pytest.mark.parametrize("cuts", SPLITS)
    @pytest.mark.parametrize("are_local", [True, False], ids=["local experts", "remote experts"])
    def test_all_prompts_at_a_time(self, cuts: tuple[int, ...], are_local: bool) -> None:
        async def main() -> None:
            experts = None if are_local else [ExpertDouble()]
            async with cared(pipeline(*faulty_stages(cuts)), experts=experts) as engine:
                await check_all(engine)
                await check_all(engine)  # with what the prefix cache has of them

        asyncio.run(main())

    def test_every_stage_gets_what_it_needs(self) -> None:
        chunk = SequenceChunk(
            tuple(goldens.PROMPTS["len7"]), 0, (3,), GREEDY, LogitsScope.ALL, TokenScoring(0, (5,), 1)
        )

        async def main() -> None:
            stages = recording_stages((0, 1, 2, 3))
            link = pipeline(*stages)
            async with serving(link) as engine:  # for its hole
                info = engine.cells[0].info
                assert info is not None
                plan = StepPlan(info.incarnation, (chunk,))
                result = await link.step(0, plan, engine._make_hole(0, Legs(), None), Legs())
            assert result.token_ids == (golden_tokens("len7")[0],)
            assert result.logits.shape == (7, CONFIG.vocab_size)
            for stage, incarnation in zip(stages, info.incarnation.split("+"), strict=True):
                assert stage.plans[0].incarnation == incarnation
            bare = SequenceChunk(chunk.token_ids, 0, (3,))
            assert [stage.plans[0].chunks for stage in stages] == [(bare,), (bare,), (chunk,)]
            assert stages[0].plans[0].hidden_state is None
            assert stages[1].plans[0].hidden_state is stages[0].results[0].hidden_state
            assert stages[2].plans[0].hidden_state is stages[1].results[0].hidden_state

        asyncio.run(main())

    def test_a_plan_for_other_stages_is_refused(self) -> None:
        async def main() -> None:
            link = pipeline(*faulty_stages((0, 1, 3)))
            await link.describe()
            with pytest.raises(FailedPrecondition) as refusal:
                await link.step(0, StepPlan("one", ()), None, Legs())  # type: ignore[arg-type]
            assert refusal.value.reason is Reason.WRONG_INCARNATION

        asyncio.run(main())

    @pytest.mark.parametrize("wrong", [0, 1])
    def test_a_stage_that_ends_with_the_wrong_thing_is_lost(self, wrong: int) -> None:
        """The first with tokens, or the last with a hidden state."""

        class Wrong(FaultyAttention):
            is_wrong = True

            async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
                result = await super().step(lane, plan, hole, legs)
                other = StepResult((1,), hidden_state=None if wrong == 0 else torch.zeros(1))
                return other if self.is_wrong else result

        async def main() -> None:
            stages = faulty_stages((0, 1, 3))
            stages[wrong] = Wrong(address="ab"[wrong], held=range(1) if wrong == 0 else range(1, 3))
            async with cared(pipeline(*stages), max_migrations=1) as engine:
                with pytest.raises(Unavailable, match="was lost 2 times"):
                    await tokens_of(engine.submit(golden_request("len1")))
                stages[wrong].is_wrong = False  # type: ignore[attr-defined]
                await check_all(engine, ["len1"])

        asyncio.run(main())


class Meeting(FaultyAttention):
    """A stage whose steps wait until a step is in another stage at the same time."""

    def __init__(self, barrier: asyncio.Barrier, waits: int, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._barrier, self._waits = barrier, waits
        self.lanes: list[int] = []

    async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
        self.lanes.append(lane)
        if self.num_steps == self._waits:
            async with asyncio.timeout(10.0):
                await self._barrier.wait()
        return await super().step(lane, plan, hole, legs)


class TestLanes:
    @pytest.mark.parametrize("cuts", SPLITS)
    def test_a_step_is_in_every_stage_at_the_same_time(self, cuts: tuple[int, ...]) -> None:
        """Stage 0 meets with its last step, stage 1 with the one before: without a lane for each nobody would come."""

        async def main() -> None:
            num_stages = len(cuts) - 1
            barrier = asyncio.Barrier(num_stages)
            stages = [
                Meeting(barrier, num_stages - 1 - number, address="abc"[number], held=range(begin, end))
                for number, (begin, end) in enumerate(itertools.pairwise(cuts))
            ]
            async with serving(pipeline(*stages), max_step_tokens=33) as engine:
                generations = [engine.submit(golden_request(prompt)) for prompt in ("len70", "len33", "len7")]
                for generation, prompt in zip(generations, ("len70", "len33", "len7"), strict=True):
                    assert await tokens_of(generation) == golden_tokens(prompt)
            assert set(stages[0].lanes) == set(range(num_stages)), "one for each stage, though the setting says one"

        asyncio.run(main())

    def test_lanes_of_different_workers_have_different_numbers(self) -> None:
        """They are streams to the same experts."""
        lanes: list[int] = []

        async def main() -> None:
            links: list[Any] = [attention_link(), pipeline(*faulty_stages((0, 1, 2, 3))), attention_link()]
            async with serving(links) as engine:
                make_hole = engine._make_hole
                engine._make_hole = lambda lane, *rest: (lanes.append(lane), make_hole(lane, *rest))[1]  # type: ignore[func-returns-value]
                assert [cell.scheduler.settings.num_lanes for cell in engine.cells] == [1, 3, 1]
                await check_all(engine, ALL * 4)

        asyncio.run(main())
        assert set(lanes) == set(range(5))
