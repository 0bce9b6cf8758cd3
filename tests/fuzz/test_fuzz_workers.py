"""Every RPC of the workers with anything at all: the right code or an in-band failure, and neighbours go on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_worker.service import AttentionService
from expert_worker import weights
from expert_worker.engine import ExpertEngine
from expert_worker.experts import ExpertSet
from expert_worker.loader import ExpertLoader
from expert_worker.service import ExpertService
from grokmoe import tensors
from grokmoe.channel import open_channel
from grokmoe.checkpoint import Checkpoint
from grokmoe.errors import Code
from grokmoe.server import RoleServer
from grokmoe.telemetry import ExpertMetrics, new_registry
from grokmoe.v1 import attention_pb2, expert_pb2
from router.transport.grpc_expert import GrpcExpertLink
from tests import goldens
from tests.fuzz.calls import EXPECTED, FUZZ, Loop, code_of, ending_of
from tests.fuzz.messages import mutated, wire
from tests.router.tiny import CONFIG, DTYPE, attention_engine, device

STREAMS = {
    "/grokmoe.v1.Expert/Forward": (expert_pb2.ForwardRequest, expert_pb2.ForwardResponse, "request_id"),
    "/grokmoe.v1.Attention/Step": (attention_pb2.StepRequest, attention_pb2.StepResponse, "step_id"),
}
DESCRIBE = {
    "/grokmoe.v1.Expert/Describe": expert_pb2.ExpertDescribeRequest,
    "/grokmoe.v1.Attention/Describe": attention_pb2.AttentionDescribeRequest,
}
CHANGES = {
    "/grokmoe.v1.Expert/Load": (expert_pb2.ExpertLoadRequest, expert_pb2.ExpertLoadResponse),
    "/grokmoe.v1.Expert/Unload": (expert_pb2.ExpertUnloadRequest, expert_pb2.ExpertUnloadResponse),
}
ALL_EXPERTS = [expert_pb2.ExpertRange(expert=e, layer_end=CONFIG.num_layers) for e in range(CONFIG.num_experts)]
ROWS_ND = torch.linspace(-1, 1, 3 * CONFIG.hidden_size).reshape(3, CONFIG.hidden_size)
ANSWER_TIMEOUT = 0.3
"""Seconds in which an answer comes if one comes at all; many messages are answered by nothing, such as a first part."""


class Workers:
    """One of each kind."""

    async def start(self) -> None:
        metrics = ExpertMetrics(new_registry())
        self.checkpoint = Checkpoint.open(goldens.DIRECTORY)
        held = {layer: tuple(range(CONFIG.num_experts)) for layer in range(CONFIG.num_layers)}
        self.experts = ExpertSet(CONFIG, held, DTYPE, torch.device("cpu"))
        weights.load(self.experts, self.checkpoint)
        self.loader = ExpertLoader(self.experts, self.checkpoint, device())
        engine = ExpertEngine(self.experts, metrics, device())
        experts = ExpertService(engine, metrics, 64, loader=self.loader).as_service()
        self.attention_engine = attention_engine(num_pages=8, max_step_tokens=32)
        attention = AttentionService(self.attention_engine).as_service()
        self.server = RoleServer([experts, attention])
        address = await self.server.start("127.0.0.1:0")
        self.channel: Any = open_channel(address)
        self.link = GrpcExpertLink(address)
        self.expected_ND = (await self.forward()).clone()

    async def forward(self) -> torch.Tensor:
        return (await self.link.forward(0, 0, (0, 3), (1, 2), ROWS_ND)).rows_ND

    async def stop(self) -> None:
        await self.link.close()
        await self.channel.close(None)
        await self.server.stop(0)
        self.loader.close()
        self.checkpoint.close()

    async def restore(self) -> None:
        """Holds all experts again, as at the start: what was given up is still there for a while."""
        request = expert_pb2.ExpertLoadRequest(config_hash=CONFIG.content_hash, experts=ALL_EXPERTS)
        await self.channel.unary_unary("/grokmoe.v1.Expert/Load")(request.SerializeToString(), timeout=10)


@pytest.fixture(scope="module")
def workers() -> Iterator[tuple[Workers, Any]]:
    loop, workers = Loop(), Workers()
    try:
        loop.run(workers.start())
        yield workers, loop.run
        loop.run(workers.stop())
    finally:
        loop.close()


def with_payload(kind: Any) -> st.SearchStrategy[bytes]:
    """Messages whose tensor is valid in itself, and sometimes of the right size."""
    shapes = st.sampled_from([(3, CONFIG.hidden_size), (0, CONFIG.hidden_size), (1, 1), (), (2, 2, 2)])
    dtypes = st.sampled_from([torch.float32, torch.bfloat16])
    headers = wire(kind.DESCRIPTOR).map(lambda data: _header(kind, data))
    return st.builds(
        lambda header, shape, dtype: tensors.encode(header, torch.zeros(shape, dtype=dtype)), headers, shapes, dtypes
    )


def _header(kind: Any, data: bytes) -> Any:
    header = kind()
    with contextlib.suppress(Exception):
        header.ParseFromString(data)
    header.ClearField("payload")
    return header


def valid(kind: Any) -> bytes:
    """A request that is answered with rows, or a plan that is."""
    if kind is expert_pb2.ForwardRequest:
        return tensors.encode(kind(request_id=7, expert_ids=[0, 3], counts=[1, 2]), ROWS_ND)
    chunk = attention_pb2.SequenceChunk(token_ids=[5, 6], page_ids=[0], sampling=attention_pb2.TokenSampling())
    return tensors.encode(kind(step_id=7, plan=attention_pb2.StepPlan(chunks=[chunk])))


async def converse(channel: Any, method: str, parts: list[bytes]) -> tuple[list[Any], str | None]:
    """Answers to these messages, and the stream's code if it has ended by itself."""
    call, answers = channel.stream_stream(method)(), []
    kind = STREAMS[method][1]
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            for part in parts:
                await call.write(part)
            await call.done_writing()
            while (data := await call.read()) is not grpc.aio.EOF:
                answers.append(tensors.decode(kind, data)[0])
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass
    except TimeoutError:
        call.cancel()
        return answers, None
    return answers, await ending_of(call)


@pytest.mark.parametrize("method", STREAMS)
def test_streams(workers: tuple[Workers, Any], method: str) -> None:
    serving, run = workers
    kind = STREAMS[method][0]
    messages = wire(kind.DESCRIPTOR) | with_payload(kind) | mutated(st.just(valid(kind)))

    @settings(FUZZ, max_examples=30)
    @given(st.lists(messages, min_size=1, max_size=4))
    def check(parts: list[bytes]) -> None:
        async def beside_a_neighbour() -> tuple[list[Any], str | None, torch.Tensor]:
            (answers, code), rows_ND = await asyncio.gather(converse(serving.channel, method, parts), serving.forward())
            return answers, code, rows_ND

        answers, code, rows_ND = run(beside_a_neighbour())
        assert torch.equal(rows_ND, serving.expected_ND)
        assert code in EXPECTED | {None}
        failed = {answer.failure.code for answer in answers if answer.HasField("failure")}
        assert not failed & {Code.INTERNAL, Code.UNKNOWN}, answers

    check()


def changes(kind: Any) -> st.SearchStrategy[bytes]:
    """Requests that mean this model, with ranges of any numbers, most of them small."""
    number = st.integers(0, 9) | st.sampled_from([2**31, 2**32 - 1])
    ranges = st.builds(lambda e, begin, end: expert_pb2.ExpertRange(expert=e, layer_begin=begin, layer_end=end),
                       number, number, number)  # fmt: skip
    return st.lists(ranges, max_size=4).map(
        lambda experts: kind(config_hash=CONFIG.content_hash, experts=experts).SerializeToString()
    )


@pytest.mark.parametrize("method", CHANGES)
def test_changes_of_what_is_held(workers: tuple[Workers, Any], method: str) -> None:
    """Neighbours are served whatever is given up meanwhile, and what is refused changes nothing."""
    serving, run = workers
    kind, _ = CHANGES[method]
    whole = st.just(kind(config_hash=CONFIG.content_hash, experts=ALL_EXPERTS).SerializeToString())

    @settings(FUZZ, max_examples=40)
    @given(wire(kind.DESCRIPTOR) | changes(kind) | mutated(changes(kind) | whole))
    def check(data: bytes) -> None:
        async def beside_a_neighbour() -> tuple[str, torch.Tensor]:
            if method.endswith("/Load"):
                serving.loader.unload(serving.experts.holdings.held)
            return await asyncio.gather(code_of(serving.channel, method, [data]), serving.forward())

        whole_held = serving.experts.holdings.held
        code, rows_ND = run(beside_a_neighbour())
        assert code in EXPECTED
        assert torch.equal(rows_ND, serving.expected_ND)
        if code not in ("OK", "DEADLINE_EXCEEDED"):
            assert serving.experts.holdings.held == (frozenset() if method.endswith("/Load") else whole_held)
        run(serving.restore())
        assert serving.experts.holdings.held == whole_held

    check()


@pytest.mark.parametrize("method", DESCRIBE)
def test_describe(workers: tuple[Workers, Any], method: str) -> None:
    serving, run = workers

    @FUZZ
    @given(wire(DESCRIBE[method].DESCRIPTOR))
    def check(data: bytes) -> None:
        # UNAVAILABLE: somebody else has the lease of an attention worker.
        assert run(code_of(serving.channel, method, [data])) in EXPECTED | {"UNAVAILABLE"}

    check()
