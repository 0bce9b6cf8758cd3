"""The engine over real attention engines and the experts of tiny-a: whatever happens on the way, the tokens are those
of the goldens, and nothing is left behind.
"""

from __future__ import annotations

import asyncio
import logging

import pytest

from grokmoe.errors import InternalError, InvalidRequest, ResourceExhausted, Unavailable
from grokmoe.step_plan import StepPlan, StepResult
from router.admission import AdmissionSettings
from router.engine import Engine
from router.experts import ExpertPoolSettings
from router.legs import Legs
from router.request import SamplingSettings
from router.transport.base import AttentionInfo, ExpertLink, Hole
from router.transport.local import LocalAttentionLink
from router.worker_state import WorkerState
from tests import goldens
from tests.router.tiny import (
    CONFIG,
    ExpertDouble,
    RestartingAttention,
    attention_link,
    golden_request,
    golden_tokens,
    serving,
    tokens_of,
    until,
)

ALL = [*goldens.PROMPTS] * 2
QUICK = ExpertPoolSettings(replica_wait=0.1, probe_interval=0.01)


async def check_all(engine: Engine, prompts: list[str] = ALL) -> None:
    """Asks for all prompts at the same time; every answer is the golden one."""
    generations = [engine.submit(golden_request(prompt)) for prompt in prompts]
    answers = await asyncio.gather(*map(tokens_of, generations))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == golden_tokens(prompt), prompt


def two_experts() -> list[ExpertLink]:
    return [ExpertDouble(range(4)), ExpertDouble(range(4, 8))]


class TestTokens:
    @pytest.mark.parametrize("lanes", [1, 2, 3])
    @pytest.mark.parametrize("are_local", [True, False], ids=["local", "links"])
    def test_many_at_the_same_time(self, lanes: int, are_local: bool) -> None:
        async def main() -> None:
            links = None if are_local else two_experts()
            async with serving(attention_link(), links, num_lanes=lanes, max_step_tokens=24) as engine:
                await check_all(engine)
                assert engine.num_running == engine.num_waiting == 0
                assert sum(engine.counter.by_expert()) > 0

        asyncio.run(main())

    @pytest.mark.parametrize("lanes", [1, 3])
    def test_few_pages_force_preemption(self, lanes: int) -> None:
        async def main() -> None:
            async with serving(attention_link(num_pages=12), num_lanes=lanes, max_step_tokens=24) as engine:
                await check_all(engine, [*ALL, "len33", "len33"])
                assert engine.report.num_preemptions > 0
                assert engine.cells[0].scheduler.ledger.num_used == 0

        asyncio.run(main())

    def test_a_common_prefix_is_computed_once(self) -> None:
        async def main() -> None:
            async with serving(attention_link()) as engine:
                first = engine.submit(golden_request("len70"))
                assert await tokens_of(first) == golden_tokens("len70")
                second = engine.submit(golden_request("len70"))
                assert await tokens_of(second) == golden_tokens("len70")
                assert first.sequences[0].num_cached_tokens == 0
                assert second.sequences[0].num_cached_tokens == 64, "eight full pages, the rest is computed"

        asyncio.run(main())

    def test_all_logits_of_a_prompt(self) -> None:
        async def main() -> None:
            async with serving(attention_link(), max_step_tokens=9) as engine:
                generation = engine.submit(golden_request("len33", max_tokens=1, logits=True))
                await tokens_of(generation)
                reference_TV = goldens.logits("seed", "len33")
                assert [start for start, _ in generation.logits()] == [0, 9, 18, 27]
                for start, logits_TV in generation.logits():
                    error = (logits_TV - reference_TV[start : start + len(logits_TV)]).abs().max()
                    assert error < 1e-4

        asyncio.run(main())

    def test_a_seed_draws_the_same_again_and_after_a_loss(self) -> None:
        async def draw(seed: int, dies_at: list[int]) -> list[int]:
            async with serving(RestartingAttention(dies_at)) as engine:
                how = SamplingSettings(temperature=1.0, top_p=0.9, seed=seed)
                return await tokens_of(engine.submit(golden_request("len7", sampling=how)))

        async def main() -> None:
            assert await draw(5, []) == await draw(5, [0, 6]) != await draw(6, [])

        asyncio.run(main())


class TestAdmission:
    def test_too_many_are_refused_at_once(self) -> None:
        async def main() -> None:
            async with serving(attention_link(), admission=AdmissionSettings(max_waiting=2), max_running=1) as engine:
                accepted = [engine.submit(golden_request(prompt)) for prompt in ("len1", "len2")]
                with pytest.raises(ResourceExhausted, match="2 sequences wait already, limit is 2") as caught:
                    engine.submit(golden_request("len7"))
                assert caught.value.retry_after > 0
                for generation, prompt in zip(accepted, ("len1", "len2"), strict=True):
                    assert await tokens_of(generation) == golden_tokens(prompt)
                await check_all(engine, ["len7"])

        asyncio.run(main())

    def test_what_can_never_fit_is_refused(self) -> None:
        async def main() -> None:
            async with serving(attention_link(num_pages=4)) as engine:
                with pytest.raises(InvalidRequest) as caught:
                    engine.submit(golden_request("len70"))
                assert caught.value.field == "prompt"
                with pytest.raises(InvalidRequest) as caught:
                    engine.submit(golden_request("len7", max_tokens=100))
                assert caught.value.field == "stopping.max_tokens"
                engine.check()
                await check_all(engine, ["len7"])

        asyncio.run(main())

    def test_nothing_is_accepted_before_a_worker_has_joined(self) -> None:
        async def main() -> None:
            async with serving(attention_link()) as engine:
                engine.cells[0].info, info = None, engine.cells[0].info
                engine.cells[0].state = WorkerState.JOINING
                with pytest.raises(Unavailable, match="no attention worker"):
                    engine.submit(golden_request("len1"))
                engine.cells[0].info, engine.cells[0].state = info, WorkerState.READY

        asyncio.run(main())


class TestCancellation:
    @pytest.mark.parametrize("links", [None, two_experts], ids=["local", "links"])
    def test_pages_come_free_within_a_step(self, links: object) -> None:
        async def main() -> None:
            remote = two_experts() if links else None
            async with serving(attention_link(), remote) as engine:
                ledger = engine.cells[0].scheduler.ledger
                leaving = engine.submit(golden_request("len70", max_tokens=400))
                await leaving.take()
                assert ledger.num_used > 0
                engine.cancel(leaving)
                num_steps = engine.report.num_steps
                await until(lambda: ledger.num_used == 0)
                assert engine.report.num_steps <= num_steps + 1
                engine.cancel(leaving)  # once more does no harm
                engine.check()
                await check_all(engine, ["len7"])

        asyncio.run(main())

    def test_who_waits_can_leave(self) -> None:
        async def main() -> None:
            async with serving(attention_link(), max_running=1) as engine:
                first, second = engine.submit(golden_request("len7")), engine.submit(golden_request("len1"))
                engine.cancel(second)
                assert await tokens_of(first) == golden_tokens("len7")

        asyncio.run(main())

    def test_those_who_stay_do_not_notice(self) -> None:
        async def main() -> None:
            async with serving(attention_link(num_pages=16), num_lanes=2, max_step_tokens=16) as engine:
                leaving = [engine.submit(golden_request(prompt, max_tokens=40)) for prompt in ALL]
                staying = asyncio.create_task(check_all(engine))
                for generation in leaving:
                    await asyncio.sleep(0)
                    engine.cancel(generation)
                await staying

        asyncio.run(main())

    def test_closing_tells_who_waits(self) -> None:
        async def main() -> None:
            async with serving(attention_link()) as engine:
                generation = engine.submit(golden_request("len7", max_tokens=400))
                await generation.take()
            with pytest.raises(Unavailable, match="shutting down"):
                await tokens_of(generation)

        asyncio.run(main())


class TestLostAttention:
    @pytest.mark.parametrize("lanes", [1, 2])
    @pytest.mark.parametrize("dies_at", [[0], [3], [2, 9]])
    def test_a_worker_that_comes_back_as_another(self, lanes: int, dies_at: list[int]) -> None:
        async def main() -> None:
            link = RestartingAttention(dies_at)
            async with serving(link, num_lanes=lanes, max_step_tokens=24) as engine:
                await check_all(engine, [*goldens.PROMPTS])
                assert len(set(link.incarnations)) == 1 + len(dies_at)
                assert engine.cells[0].state is WorkerState.READY

        asyncio.run(main())

    def test_its_sequences_move_to_another(self) -> None:
        async def main() -> None:
            mortal = RestartingAttention([2], returns=False)
            async with serving([mortal, attention_link()], max_step_tokens=24) as engine:
                await check_all(engine)
                assert engine.cells[0].state is WorkerState.SUSPECT
                await check_all(engine, ["len7"])

        asyncio.run(main())

    def test_requests_that_come_meanwhile_wait(self) -> None:
        async def main() -> None:
            link = RestartingAttention([0])
            async with serving(link) as engine:
                first = engine.submit(golden_request("len1"))
                await until(lambda: engine.cells[0].state is WorkerState.SUSPECT)
                second = engine.submit(golden_request("len2"))
                assert await tokens_of(first) == golden_tokens("len1")
                assert await tokens_of(second) == golden_tokens("len2")

        asyncio.run(main())

    def test_a_late_failure_does_not_touch_what_has_moved(self) -> None:
        """One lane finds the worker lost while another lane's step is in flight: that one is cut off."""

        class Held(RestartingAttention):
            """Steps end when and how the test says."""

            def __init__(self) -> None:
                super().__init__([])
                self.ends: list[asyncio.Future[StepResult]] = []

            async def describe(self) -> AttentionInfo:
                if self.ends:
                    raise Unavailable("gone")
                return await super().describe()

            async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
                self.ends.append(asyncio.get_running_loop().create_future())
                return await self.ends[-1]

        async def main() -> None:
            held = Held()
            async with serving([held, attention_link()], num_lanes=2, max_step_tokens=33) as engine:
                prompts = ["len33", "len1", "len70"]
                generations = [engine.submit(golden_request(prompt)) for prompt in prompts]
                await until(lambda: len(held.ends) == 2)
                held.ends[0].set_exception(Unavailable("lost"))
                await until(lambda: engine.cells[0].state is WorkerState.SUSPECT)
                assert held.ends[1].cancelled(), "the other lane need not wait for an answer any more"
                for generation, prompt in zip(generations, prompts, strict=True):
                    assert await tokens_of(generation) == golden_tokens(prompt)
                assert not any(task.done() for task in engine.cells[0]._lanes._tasks), "both lanes are alive"

        asyncio.run(main())

    def test_a_worker_that_draws_too_few_tokens(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.CRITICAL)

        class Miscounting(LocalAttentionLink):
            is_wrong = True

            async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
                result = await super().step(lane, plan, hole, legs)
                return StepResult(()) if self.is_wrong else result

        async def main() -> None:
            good = attention_link()
            link = Miscounting(good._engine, good._info)
            async with serving(link) as engine:
                with pytest.raises(Unavailable, match="was lost 6 times"):
                    await tokens_of(engine.submit(golden_request("len1")))
                link.is_wrong = False
                await check_all(engine, ["len1"])

        asyncio.run(main())

    def test_a_token_that_the_vocabulary_does_not_have(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.CRITICAL)

        class Inventing(LocalAttentionLink):
            num_wrong = 0

            async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
                result = await super().step(lane, plan, hole, legs)
                self.num_wrong += 1
                if self.num_wrong > 3:
                    return result
                return StepResult((CONFIG.vocab_size,) * len(result.token_ids))

        async def main() -> None:
            good = attention_link()
            async with serving(Inventing(good._engine, good._info)) as engine:
                await check_all(engine, ["len7"])

        asyncio.run(main())


class TestLostExperts:
    def test_a_replica_takes_over_in_the_middle(self) -> None:
        async def main() -> None:
            mortal, replica = ExpertDouble(), ExpertDouble()
            async with serving(attention_link(), [mortal, replica], QUICK) as engine:
                answers = asyncio.create_task(check_all(engine))
                await until(lambda: len(mortal.calls) >= 5)
                mortal.is_up = False
                await answers
                assert engine.pool is not None
                num_calls = len(mortal.calls)
                await check_all(engine, ["len7"])
                assert len(mortal.calls) == num_calls, "who is suspect gets no work"

        asyncio.run(main())

    def test_without_one_only_the_requests_concerned_fail(self) -> None:
        async def main() -> None:
            patient = ExpertPoolSettings(replica_wait=1.0, probe_interval=0.01)
            links = [ExpertDouble(range(4)), ExpertDouble(range(4, 8))]
            async with serving(attention_link(), links, patient, max_running=1) as engine:
                await check_all(engine, ["len2"])
                links[1].is_up = False
                failing, waiting = engine.submit(golden_request("len33")), engine.submit(golden_request("len7"))
                with pytest.raises(Unavailable) as caught:
                    await tokens_of(failing)
                links[1].is_up = True
                assert "expert 4" in caught.value.message
                assert await tokens_of(waiting) == golden_tokens("len7")
                await check_all(engine)

        asyncio.run(main())

    def test_an_expert_that_computes_nonsense_fails_the_request_only(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.CRITICAL)

        async def main() -> None:
            def broken(*_: object) -> object:
                raise ZeroDivisionError("x / 0")

            bad = ExpertDouble()
            good, bad._forward = bad._forward, broken  # type: ignore[assignment]
            async with serving(attention_link(), [bad]) as engine:
                with pytest.raises(InternalError, match="ZeroDivisionError"):
                    await tokens_of(engine.submit(golden_request("len1")))
                bad._forward = good
                await check_all(engine, ["len1"])

        asyncio.run(main())
