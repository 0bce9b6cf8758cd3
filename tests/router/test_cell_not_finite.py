"""Rows that come out as NaN end the requests they belong to, and no other of the same step."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
import torch

from grokmoe.errors import InternalError
from router.experts import ExpertPoolSettings
from router.step_pace import StepPaceSettings
from tests.router.faulty_attention import Fault, FaultyAttention
from tests.router.test_cell_faults import ALL, PATIENT, cared, check_all
from tests.router.tiny import ExpertDouble, attention_link, experts, golden_request, golden_tokens, serving, tokens_of

BAD_ID = 3
"""A token of which no expert can make anything, wherever it stands."""


class Allergic(ExpertDouble):
    """Answers with NaN for rows that are the first layer's input of BAD_ID; every holder does."""

    def __init__(self, is_bad: Any) -> None:
        def forward(layer: int, expert_ids: Any, counts: Any, rows_ND: torch.Tensor) -> torch.Tensor:
            out_ND = experts(layer, expert_ids, counts, rows_ND).clone()
            for row in range(len(rows_ND)):
                if is_bad(layer, rows_ND[row]):
                    out_ND[row] = torch.nan
            return out_ND

        super().__init__(forward=forward)


def poisoned(rows: list[torch.Tensor]) -> Any:
    """Bad is what equals one of these rows of layer 0."""
    return lambda layer, row_D: layer == 0 and any(torch.equal(row_D, bad_D) for bad_D in rows)


async def rows_of(prompt_ids: tuple[int, ...]) -> list[torch.Tensor]:
    """The rows that layer 0 sends to experts for a prompt's last token."""
    seen: list[torch.Tensor] = []

    def forward(layer: int, expert_ids: Any, counts: Any, rows_ND: torch.Tensor) -> torch.Tensor:
        if layer == 0:
            seen.extend(rows_ND.clone())
        return experts(layer, expert_ids, counts, rows_ND)

    async with serving(attention_link(), [ExpertDouble(forward=forward)]) as engine:
        await tokens_of(engine.submit(golden_request("len1", prompt_ids=prompt_ids, max_tokens=1)))
    return seen


QUICK = ExpertPoolSettings(probe_interval=0.005, probe_interval_max=0.02)


@pytest.mark.parametrize("num_lanes", [1, 2])
@pytest.mark.parametrize("prompt_ids", [(BAD_ID,), (5, 9, BAD_ID, 2, 77)])
def test_rows_without_an_answer_anywhere(prompt_ids: tuple[int, ...], num_lanes: int) -> None:
    async def main() -> None:
        is_bad = poisoned(await rows_of(prompt_ids))
        holders = [Allergic(is_bad), Allergic(is_bad)]
        faults = {"care": dataclasses.replace(PATIENT, pace=StepPaceSettings(factor=1e6))}
        async with serving(
            [attention_link(), attention_link()], holders, QUICK, faults=faults, num_lanes=num_lanes, max_step_tokens=64
        ) as engine:
            asked = [(prompt, engine.submit(golden_request(prompt))) for prompt in ALL]
            bad = engine.submit(golden_request("len1", prompt_ids=prompt_ids, request_id="bad"))
            asked += [(prompt, engine.submit(golden_request(prompt))) for prompt in ALL]
            with pytest.raises(InternalError):
                await tokens_of(bad)
            for prompt, generation in asked:
                assert await tokens_of(generation) == golden_tokens(prompt)
                assert generation.sequences[0].num_admissions == 1, "nobody else was computed again"
            assert engine.faults.losses == 0, "the attention worker is not to blame"

    asyncio.run(main())


def test_neighbours_of_a_faulty_chunk_keep_what_was_computed() -> None:
    async def main() -> None:
        link = FaultyAttention({number: Fault.NAN for number in range(2, 6)})
        async with cared(link, PATIENT) as engine:
            asked = [(prompt, engine.submit(golden_request(prompt))) for prompt in ALL]
            ended = num_again = 0
            for prompt, generation in asked:
                try:
                    assert await tokens_of(generation) == golden_tokens(prompt)
                except InternalError:
                    ended += 1
                num_again += generation.sequences[0].num_admissions - 1
            assert engine.faults.faulty_chunks == 4
            assert num_again <= 4
            assert ended <= 2
            await check_all(engine)

    asyncio.run(main())


def test_two_faults_with_tokens_between_them_are_the_workers() -> None:
    async def main() -> None:
        link = FaultyAttention({2: Fault.NAN, 5: Fault.NAN})
        async with cared(link, PATIENT) as engine:
            assert await tokens_of(engine.submit(golden_request("len33"))) == golden_tokens("len33")
            assert engine.faults.faulty_chunks == 2

    asyncio.run(main())
