"""A sequence that kills its worker: it ends, and nobody who was beside it does."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from grokmoe.errors import Unavailable
from grokmoe.step_plan import StepPlan, StepResult
from router.legs import Legs
from router.sequence import SUSPECT_AFTER
from router.transport.base import Hole
from tests import goldens
from tests.router.faulty_attention import Fault, FaultyAttention
from tests.router.test_cell_faults import ALL, PATIENT, begun, cared, check_all
from tests.router.tiny import golden_request, golden_tokens, tokens_of, until

POISON = (33, 1, 4, 1, 5)
"""No other prompt begins with its first token."""
assert all(goldens.PROMPTS[prompt][0] != POISON[0] for prompt in ALL)


class Poisoned(FaultyAttention):
    """Dies of every step that begins with POISON. `victims`: chunks of those steps."""

    def __init__(self) -> None:
        super().__init__()
        self.victims: list[int] = []

    async def step(self, lane: int, plan: StepPlan, hole: Hole, legs: Legs) -> StepResult:
        if any(chunk.start == 0 and chunk.token_ids[0] == POISON[0] for chunk in plan.chunks):
            self.victims.append(len(plan.chunks))
            self.faults[self.num_steps] = Fault.DIE
        return await super().step(lane, plan, hole, legs)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("num_lanes", [1, 2])
def test_only_the_poison_ends(num_workers: int, num_lanes: int) -> None:
    async def main() -> None:
        links = [Poisoned() for _ in range(num_workers)]
        async with cared(list(links), PATIENT, limits={"num_lanes": num_lanes}, max_migrations=4) as engine:
            asked = [(prompt, engine.submit(golden_request(prompt))) for prompt in [*ALL, *ALL]]
            poison = engine.submit(golden_request("len7", prompt_ids=POISON, request_id="poison"))
            with pytest.raises(Unavailable, match="lost 5 times"):
                await tokens_of(poison)
            for prompt, generation in asked:
                assert await tokens_of(generation) == golden_tokens(prompt)
                assert generation.sequences[0].num_migrations <= SUSPECT_AFTER
            victims = [count for link in links for count in link.victims]
            assert len(victims) == 5
            assert sorted(victims)[: 5 - SUSPECT_AFTER] == [1] * (5 - SUSPECT_AFTER), "in steps of its own"
            await check_all(engine)

    asyncio.run(main())


def test_whoever_draws_a_token_alone_is_acquitted() -> None:
    async def main() -> None:
        link = FaultyAttention()
        async with cared(link, PATIENT, max_migrations=3) as engine:
            generations = await begun(engine, *ALL)
            for _ in range(SUSPECT_AFTER):
                link.faults[link.num_steps] = Fault.DIE
                number = link.num_steps
                await until(lambda number=number: link.num_steps > number)  # type: ignore[misc]
            sequences = [generation.sequences[0] for generation in generations]
            for prompt, generation in zip(ALL, generations, strict=True):
                assert await tokens_of(generation) == golden_tokens(prompt)
            assert not any(sequence.is_suspect for sequence in sequences)
            assert max(sequence.num_acquitted for sequence in sequences) == SUSPECT_AFTER

    asyncio.run(main())


def test_suspects_and_others_take_turns() -> None:
    steps: list[list[bool]] = []

    async def main() -> None:
        link = FaultyAttention()
        async with cared(link, PATIENT, limits={"num_lanes": 2}) as engine:
            old = [engine.submit(golden_request(prompt)) for prompt in ("len7", "len33")]
            for generation in old:
                generation.sequences[0].num_migrations = SUSPECT_AFTER
            scheduler: Any = engine.cells[0].scheduler
            scheduler._turns.has_suspects = True
            new = [engine.submit(golden_request(prompt)) for prompt in ("len1", "len7")]
            begin = scheduler._begin

            def watched(chunks: Any) -> Any:
                step = begin(chunks)
                if step is not None:
                    steps.append([chunk.sequence.is_suspect for chunk in step.chunks])
                return step

            scheduler._begin = watched
            for prompt, generation in zip(("len7", "len33", "len1", "len7"), [*old, *new], strict=True):
                assert await tokens_of(generation) == golden_tokens(prompt)

    asyncio.run(main())
    with_suspects = [step for step in steps if any(step)]
    assert with_suspects
    assert all(len(step) == 1 for step in with_suspects)
    alone = [number for number, step in enumerate(steps) if any(step)]
    assert all(after - before > 1 for before, after in itertools.pairwise(alone)), "the others starve"
