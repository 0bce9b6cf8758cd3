"""Every RPC of vllm.grpc.engine.VllmEngine with anything at all, as tests/fuzz/test_fuzz_router.py does for ours."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("smg_grpc_proto")

from hypothesis import given, settings
from hypothesis import strategies as st
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from grokmoe import AsyncClient
from grokmoe.channel import open_channel
from grokmoe.server import RoleServer
from launcher.paths import DEMO_MODEL
from router.service import GenerationService
from router.vllm_engine import vllm_engine_service
from tests import goldens
from tests.fuzz.calls import EXPECTED, FUZZ, Loop, all_tasks, beside_a_neighbour, settled
from tests.fuzz.messages import mutated, wire
from tests.router.served import TOKENIZER, Served
from tests.router.tiny import attention_link, serving

DESCRIBED = vllm.DESCRIPTOR.services_by_name["VllmEngine"]
METHODS = {f"/{DESCRIBED.full_name}/{method.name}": method.input_type for method in DESCRIBED.methods}
REFUSED = {"Embed", "StartProfile", "StopProfile", "SubscribeKvEvents"}
GENERATE = f"/{DESCRIBED.full_name}/Generate"


@contextlib.asynccontextmanager
async def both_services() -> AsyncIterator[Served]:
    """Theirs, to be fuzzed, and ours, for the neighbour."""
    async with serving(attention_link()) as engine:
        generation = GenerationService(engine, TOKENIZER, "tiny", "float32")
        theirs = vllm_engine_service(generation, engine, "tiny", "float32", DEMO_MODEL)
        assert theirs is not None
        server = RoleServer([generation.as_service(), theirs])
        address = await server.start("127.0.0.1:0")
        channel = open_channel(address)
        try:
            async with AsyncClient(address, timeout=30, retries=0) as client:
                yield Served(address, engine, client, channel, None, None, server)
        finally:
            await channel.close(None)
            await server.stop(0)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Served, Callable[[Any], Any]]]:
    loop, stack = Loop(), contextlib.AsyncExitStack()
    try:
        yield loop.run(stack.enter_async_context(both_services())), loop.run
        loop.run(stack.aclose())
    finally:
        loop.close()


def expected(method: str) -> set[str]:
    return {"UNIMPLEMENTED"} if method.rpartition("/")[2] in REFUSED else EXPECTED


@pytest.mark.parametrize("method", METHODS)
def test_one_message(served: Any, method: str) -> None:
    serving, run = served
    num_tasks = len(run(all_tasks()))

    @FUZZ
    @given(wire(METHODS[method]))
    def check(data: bytes) -> None:
        assert run(beside_a_neighbour(serving, method, [data])) in expected(method)

    check()
    run(settled(num_tasks))


PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 1.0, -1.0]),
        "top_p": st.sampled_from([0.0, 0.5, 2.0]),
        "top_k": st.integers(0, 3),
        "max_tokens": st.integers(0, 20),
        "min_tokens": st.integers(0, 3),
        "stop": st.lists(st.sampled_from(["", "a", "b" * 300]), max_size=2),
        "stop_token_ids": st.lists(st.sampled_from([5, 2**32 - 1]), max_size=2),
        "n": st.integers(0, 70),
        "logprobs": st.integers(-2, 3),
        "prompt_logprobs": st.integers(-2, 3),
        "seed": st.sampled_from([-1, 0, 2**31 - 1]),
        "logit_bias": st.dictionaries(st.sampled_from([-1, 5, 2**31 - 1]), st.floats(-200, 200), max_size=2),
        "truncate_prompt_tokens": st.integers(-2, 8),
        "regex": st.sampled_from(["a*", "(", ""]),
    },
)


@st.composite
def nearly_right(draw: st.DrawFn) -> bytes:
    """Requests that are valid but for a value or two: these get further than those that hold just anything."""
    request = vllm.GenerateRequest(
        request_id=draw(st.sampled_from(["", "a", "x" * 200])),
        tokenized=vllm.TokenizedInput(input_ids=draw(st.sampled_from([goldens.PROMPTS["len7"], [], [2**32 - 1]]))),
        sampling_params=vllm.SamplingParams(**draw(PARAMS)),
        stream=draw(st.booleans()),
    )
    return request.SerializeToString()


def test_requests_that_are_nearly_right(served: Any) -> None:
    serving, run = served
    num_tasks = len(run(all_tasks()))

    @settings(FUZZ, max_examples=40)
    @given(nearly_right() | mutated(nearly_right()))
    def check(data: bytes) -> None:
        assert run(beside_a_neighbour(serving, GENERATE, [data])) in EXPECTED

    check()
    run(settled(num_tasks))


@pytest.mark.parametrize("method", METHODS)
def test_no_message_or_several(served: Any, method: str) -> None:
    serving, run = served

    @settings(FUZZ, max_examples=3)
    @given(st.lists(wire(METHODS[method]), max_size=3).filter(lambda parts: len(parts) != 1))
    def check(parts: list[bytes]) -> None:
        code = run(beside_a_neighbour(serving, method, parts))
        # gRPC's library answers a unary call with no message or several by itself, or waits for one.
        assert code in EXPECTED | {"UNIMPLEMENTED", "CANCELLED"}

    check()
