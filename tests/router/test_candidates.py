"""Requests with several candidates, and requests ended by their id: the engine over tiny-a."""

from __future__ import annotations

import asyncio

import pytest

from grokmoe.errors import AlreadyExists, ResourceExhausted
from router.admission import AdmissionSettings
from router.request import SamplingSettings
from router.sequence import FinishReason
from tests.router.tiny import (
    PAGE_SIZE,
    TIMEOUT,
    RestartingAttention,
    attention_link,
    candidates_of,
    golden_request,
    golden_tokens,
    serving,
    tokens_of,
    until,
)

DRAWN = SamplingSettings(temperature=1.0, seed=3)


class TestCandidates:
    def test_each_is_what_its_seed_alone_would_draw(self) -> None:
        async def main() -> None:
            async with serving(attention_link()) as engine:
                together = await candidates_of(engine.submit(golden_request("len33", n=4, sampling=DRAWN)))
                assert len({tuple(tokens) for tokens in together}) == 4
                for index, tokens in enumerate(together):
                    how = SamplingSettings(temperature=1.0, seed=DRAWN.seed_of(index))
                    assert await tokens_of(engine.submit(golden_request("len33", sampling=how))) == tokens
                greedy = await candidates_of(engine.submit(golden_request("len33", n=3)))
                assert greedy == [golden_tokens("len33")] * 3

        asyncio.run(main())

    def test_the_prompt_is_computed_once_and_its_pages_are_shared(self) -> None:
        async def main() -> None:
            async with serving(attention_link()) as engine:
                ledger = engine.cells[0].scheduler.ledger
                generation = engine.submit(golden_request("len70", n=4, max_tokens=2))
                prompt_pages, most_used = 70 // PAGE_SIZE, 0
                answers = asyncio.create_task(candidates_of(generation))
                while not answers.done():
                    most_used = max(most_used, ledger.num_used)
                    await asyncio.sleep(0)
                assert await answers == [golden_tokens("len70")[:2]] * 4
                cached = [sequence.num_cached_tokens for sequence in generation.sequences]
                assert cached == [0, 64, 64, 64]
                assert most_used <= prompt_pages + 4, "eight pages for all and one for each"

        asyncio.run(main())

    def test_the_loss_of_a_worker_changes_no_candidate(self) -> None:
        async def draw(dies_at: list[int]) -> list[list[int]]:
            async with serving(RestartingAttention(dies_at)) as engine:
                return await candidates_of(engine.submit(golden_request("len33", n=3, sampling=DRAWN)))

        async def main() -> None:
            assert await draw([]) == await draw([0, 4, 9])

        asyncio.run(main())

    def test_one_can_leave_and_the_others_go_on(self) -> None:
        async def main() -> None:
            async with serving(attention_link()) as engine:
                generation = engine.submit(golden_request("len7", n=2, max_tokens=200))
                await generation.take()
                assert engine.cancel_candidate(generation, 0)
                assert not engine.cancel_candidate(generation, 0), "it has ended"
                ended = None
                async with asyncio.timeout(TIMEOUT):
                    while ended is None:
                        ended = next((d for d in await generation.take() if d.finish_reason), None)
                assert (ended.index, ended.finish_reason) == (1, FinishReason.LENGTH)
                assert engine.num_running == 0

        asyncio.run(main())

    def test_all_must_find_room_in_the_queue(self) -> None:
        async def main() -> None:
            async with serving(attention_link(), admission=AdmissionSettings(max_waiting=3)) as engine:
                with pytest.raises(ResourceExhausted, match="limit is 3"):
                    engine.submit(golden_request("len7", n=4))
                await candidates_of(engine.submit(golden_request("len7", n=3)))

        asyncio.run(main())


class TestRequestIds:
    def test_a_live_id_cannot_be_used_twice_and_a_finished_one_can(self) -> None:
        async def main() -> None:
            async with serving(attention_link()) as engine:
                first = engine.submit(golden_request("len7", request_id="mine"))
                with pytest.raises(AlreadyExists, match="mine"):
                    engine.submit(golden_request("len1", request_id="mine"))
                assert await tokens_of(first) == golden_tokens("len7"), "not disturbed"
                assert await tokens_of(engine.submit(golden_request("len1", request_id="mine"))) == golden_tokens(
                    "len1"
                )
                left = engine.submit(golden_request("len1", request_id="mine"))
                engine.cancel(left)
                await tokens_of(engine.submit(golden_request("len1", request_id="mine")))

        asyncio.run(main())

    def test_abort_ends_all_candidates_with_what_they_have(self) -> None:
        async def main() -> None:
            async with serving(attention_link()) as engine:
                ledger = engine.cells[0].scheduler.ledger
                generation = engine.submit(golden_request("len7", n=2, max_tokens=400, request_id="long"))
                deliveries = await generation.take()
                assert engine.abort("long")
                assert not engine.abort("long")
                assert not engine.abort("never was")
                tokens, reasons = {0: [], 1: []}, {}
                async with asyncio.timeout(TIMEOUT):
                    while True:
                        for delivery in deliveries:
                            tokens[delivery.index] += delivery.token_ids
                            reasons[delivery.index] = delivery.finish_reason
                        if len(reasons) == 2 and all(reasons.values()):
                            break
                        deliveries = await generation.take()
                assert set(reasons.values()) == {FinishReason.ABORTED}
                golden = golden_tokens("len7")
                assert all(tokens[index][:16] == golden[: len(tokens[index][:16])] for index in (0, 1))
                await until(lambda: ledger.num_used == 0)
                assert engine.num_running == engine.num_waiting == 0

        asyncio.run(main())

    def test_abort_of_one_that_waits(self) -> None:
        async def main() -> None:
            async with serving(attention_link(), max_running=1) as engine:
                first = engine.submit(golden_request("len7"))
                waiting = engine.submit(golden_request("len1", request_id="waiting"))
                assert engine.abort("waiting")
                (delivery,) = await waiting.take()
                assert (delivery.token_ids, delivery.finish_reason) == ([], FinishReason.ABORTED)
                assert await tokens_of(first) == golden_tokens("len7")

        asyncio.run(main())
