"""A stream that goes on after its server is gone: on another router, or on the same one started again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from grokmoe import AsyncClient, FinishReason, InvalidRequest, Unavailable
from grokmoe.errors import InternalError
from grokmoe.resumption import Resumption
from grokmoe.v1 import generation_pb2 as pb
from tests import goldens
from tests.router.served import service
from tests.router.tiny import TIMEOUT, golden_tokens

OPTIONS: dict[str, Any] = {"max_tokens": 120, "ignore_eos": True, "seed": 7, "frequency_penalty": 0.2}
IDS = goldens.PROMPTS["len33"]


@pytest.mark.parametrize("when", [1, 5, 60])
def test_it_goes_on_elsewhere_with_the_same_tokens_and_text(when: int) -> None:
    async def main() -> None:
        async with service() as one, service() as two, AsyncClient([one.address, two.address]) as client:
            expected = await client.generate(IDS, **OPTIONS)
            stream, servers = client.stream(IDS, resume=True, **OPTIONS), {one.address: one, two.address: two}
            received = []
            async with asyncio.timeout(TIMEOUT):
                async for delta in stream:
                    received += delta.token_ids
                    if len(received) >= when and len(servers) == 2:
                        (holder,) = [served for served in servers.values() if served.engine.num_running]
                        del servers[holder.address]
                        await holder.server.stop(0)
            assert len(servers) == 1, "the server was stopped in the middle"
            whole = await stream.completion()
            assert tuple(received) == whole.token_ids == expected.token_ids
            assert whole.text == expected.text
            assert (whole.usage.completion_tokens, whole.finish_reason) == (120, FinishReason.LENGTH)

    asyncio.run(main())


def test_without_resume_it_fails() -> None:
    async def main() -> None:
        async with service() as one, service() as two, AsyncClient([one.address, two.address]) as client:
            stream = client.stream(IDS, **OPTIONS)
            await anext(stream)
            (holder,) = [served for served in (one, two) if served.engine.num_running]
            await holder.server.stop(0)
            with pytest.raises(Unavailable):
                await stream.completion()

    asyncio.run(main())


def test_a_request_gets_a_seed_unless_it_is_greedy() -> None:
    drawn, greedy = pb.GenerateRequest(), pb.GenerateRequest(sampling=pb.SamplingParams(temperature=0))
    Resumption(drawn)
    Resumption(greedy)
    assert drawn.sampling.HasField("seed")
    assert not greedy.sampling.HasField("seed")


def test_what_cannot_be_resumed_is_said_at_once() -> None:
    for request in (
        pb.GenerateRequest(sampling=pb.SamplingParams(n=2)),
        pb.GenerateRequest(response=pb.ResponseOptions(echo=True)),
        pb.GenerateRequest(response=pb.ResponseOptions(prompt_logprobs=0)),
    ):
        with pytest.raises(InvalidRequest, match="resume"):
            Resumption(request)


def test_a_server_that_repeats_or_skips_is_caught() -> None:
    def message(*ids: int, completion_tokens: int) -> pb.StreamGenerateResponse:
        return pb.StreamGenerateResponse(token_ids=ids, usage=pb.Usage(completion_tokens=completion_tokens))

    for wrong in (message(7, completion_tokens=2), message(7, completion_tokens=4)):
        resumption = Resumption(pb.GenerateRequest(sampling=pb.SamplingParams(temperature=0)))
        resumption.add(message(5, 6, completion_tokens=2))
        with pytest.raises(InternalError, match="2 were received"):
            resumption.add(wrong)


def test_the_golden_tokens_after_a_restart() -> None:
    async def main() -> None:
        async with service() as one, service() as two, AsyncClient([one.address, two.address]) as client:
            stream = client.stream(IDS, resume=True, temperature=0, max_tokens=16, ignore_eos=True)
            await anext(stream)
            for served in (one, two):
                if served.engine.num_running:
                    await served.server.stop(0)
            async with asyncio.timeout(TIMEOUT):
                assert list((await stream.completion()).token_ids) == golden_tokens("len33")

    asyncio.run(main())
