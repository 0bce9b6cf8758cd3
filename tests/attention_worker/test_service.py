"""grokmoe.v1.Attention over a raw stream: misuse is answered on the stream, garbage ends it."""

from __future__ import annotations

import asyncio
import contextlib
import types
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from attention_worker.engine import AttentionEngine
from attention_worker.lease import Lease
from attention_worker.service import SERVICE, AttentionService
from grokmoe import tensors
from grokmoe.channel import open_channel
from grokmoe.errors import FailedPrecondition, InvalidRequest, Reason, Unavailable
from grokmoe.plan_codec import plan_to_proto, result_from_proto
from grokmoe.server import RoleServer
from grokmoe.status import from_failure, from_rpc_error
from grokmoe.step_plan import (
    GREEDY,
    WHOLE_VOCABULARY,
    LogitsScope,
    Penalties,
    SequenceChunk,
    TokenSampling,
    TokenScoring,
    pack_ids,
)
from grokmoe.v1 import attention_pb2 as pb
from tests import goldens
from tests.attention_worker.tiny_engine import CONFIG, attention_engine, device, moe, plan, run_step

PROMPT = tuple(goldens.PROMPTS["len7"])
CHUNK = SequenceChunk(PROMPT, 0, (3,), GREEDY)
FIRST_TOKEN = goldens.greedy("seed", "len7")[0]
LIMIT = 30.0


class Lane:
    """A Step stream, message by message."""

    def __init__(self, engine: AttentionEngine, channel: Any) -> None:
        self.engine = engine
        self._call = channel.stream_stream(f"/{SERVICE}/Step")()

    async def send(self, data: bytes) -> None:
        await self._call.write(data)

    async def begin(self, step_id: int, *chunks: SequenceChunk) -> None:
        proto = plan_to_proto(plan(self.engine, *(chunks or (CHUNK,))))
        await self.send(tensors.encode(pb.StepRequest(step_id=step_id, plan=proto)))

    async def fill(self, step_id: int, layer: int, moe_TD: torch.Tensor, **header: int) -> None:
        await self.send(tensors.encode(pb.StepRequest(step_id=step_id, layer=layer, **header), moe_TD))

    async def read(self) -> tuple[Any, torch.Tensor | None]:
        async with asyncio.timeout(LIMIT):
            data = await self._call.read()
        assert data is not grpc.aio.EOF, "the stream has ended"  # type: ignore[attr-defined]
        return tensors.decode(pb.StepResponse, data)

    async def failure(self, step_id: int) -> Any:
        header, payload = await self.read()
        assert header.step_id == step_id
        assert header.HasField("failure")
        assert payload is None
        return from_failure(header.failure)

    async def run(self, step_id: int, *chunks: SequenceChunk) -> tuple[Any, torch.Tensor | None]:
        """A whole step; the message with its result."""
        await self.begin(step_id, *chunks)
        for layer in range(CONFIG.num_layers):
            header, x_TD = await self.read()
            assert (header.step_id, header.layer) == (step_id, layer)
            assert x_TD is not None
            await self.fill(step_id, layer, moe().fill_now(layer, x_TD))
        header, logits = await self.read()
        assert header.HasField("result")
        assert header.compute_ns > 0
        return header, logits

    async def check(self, step_id: int = 99) -> None:
        """The lane works."""
        header, _ = await self.run(step_id)
        assert list(header.result.token_ids) == [FIRST_TOKEN]

    async def status(self) -> Any:
        async with asyncio.timeout(LIMIT):
            return await self._call.code()

    async def close(self) -> None:
        await self._call.done_writing()

    def cancel(self) -> None:
        self._call.cancel()


class Clock:
    """Stands still until the test turns it."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()
SERVICES: weakref.WeakKeyDictionary[AttentionEngine, AttentionService] = weakref.WeakKeyDictionary()


@contextlib.asynccontextmanager
async def worker(path: Path, held: range = range(CONFIG.num_layers)) -> AsyncIterator[tuple[AttentionEngine, Any]]:
    engine = attention_engine(max_step_tokens=50, held=held)
    SERVICES[engine] = AttentionService(engine, Lease(engine.incarnation, clock=CLOCK))
    server = RoleServer([SERVICES[engine].as_service()])
    channel = open_channel(await server.start(f"unix:{path}/socket"))
    try:
        yield engine, channel
    finally:
        await channel.close(None)
        await server.stop(0)


async def describe(channel: Any, router_id: str) -> Any:
    request = pb.AttentionDescribeRequest(router_id=router_id)
    answer = await channel.unary_unary(f"/{SERVICE}/Describe")(request.SerializeToString(), timeout=LIMIT)
    return pb.AttentionDescribeResponse.FromString(answer)


def outcome_count(engine: AttentionEngine, outcome: str) -> float:
    return float(engine.metrics.steps.labels(outcome)._value.get())


def test_describe(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(tmp_path) as (_, channel):
            describe = channel.unary_unary(f"/{SERVICE}/Describe")
            found = pb.AttentionDescribeResponse.FromString(await describe(b"", timeout=LIMIT))
            assert found == pb.AttentionDescribeResponse(
                config_hash=CONFIG.content_hash,
                incarnation="",
                dtype=tensors.wire_dtype(torch.float32),
                hidden_size=192,
                layer_begin=0,
                layer_end=3,
                num_pages=64,
                page_size=8,
                max_step_tokens=50,
                device="cpu",
                tensor_parallel=1,
            )

    asyncio.run(main())


def test_steps_one_after_another(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(tmp_path) as (engine, channel):
            lane = Lane(engine, channel)
            await lane.check(1)
            with_logits = SequenceChunk(PROMPT, 0, (3,), GREEDY, LogitsScope.ALL)
            header, logits = await lane.run(2, with_logits)
            assert list(header.result.token_ids) == [FIRST_TOKEN]
            assert logits is not None
            assert (logits - goldens.logits("seed", "len7")).abs().max() < 1e-4
            await lane.check(0)
            await lane.close()
            assert await lane.status() is grpc.StatusCode.OK

    asyncio.run(main())


def test_what_a_step_was_asked_for_comes_over_the_wire(tmp_path: Path) -> None:
    how = TokenSampling(
        bias_ids=(4, 77),
        bias=(float("-inf"), 1e6),
        penalties=Penalties(1.5, 0.5, 0.25, prompt_ids=pack_ids(PROMPT), output_ids=pack_ids([3, 3])),
        allowed=b"\xff" * (CONFIG.vocab_size // 8),
        num_logprobs=3,
    )
    chunks = (
        SequenceChunk(PROMPT, 0, (3,), how, scoring=TokenScoring(1, PROMPT[2:], 2)),
        SequenceChunk(PROMPT, 0, (4,), TokenSampling(num_logprobs=WHOLE_VOCABULARY)),
    )

    async def main() -> None:
        async with worker(tmp_path) as (engine, channel):
            header, payload = await Lane(engine, channel).run(1, *chunks)
            expected = run_step(attention_engine(), *chunks)
            found = result_from_proto(header.result, payload)
            assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)
            assert found.token_ids == (77, FIRST_TOKEN)
            assert [table.num_top for table in found.logprobs] == [2, 3, CONFIG.vocab_size]
            assert torch.equal(found.logits, expected.logits)

    asyncio.run(main())


def test_an_output_may_come_in_parts(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(tmp_path) as (engine, channel):
            lane = Lane(engine, channel)
            await lane.begin(4)
            for layer in range(CONFIG.num_layers):
                _, x_TD = await lane.read()
                assert x_TD is not None
                header = pb.StepRequest(step_id=4, layer=layer)
                for message in tensors.encode_rows(header, moe().fill_now(layer, x_TD), "step_id", max_bytes=2000):
                    await lane.send(message)
            header, _ = await lane.read()
            assert list(header.result.token_ids) == [FIRST_TOKEN]

    asyncio.run(main())


ROWS = torch.zeros(len(PROMPT), CONFIG.hidden_size)


async def _nothing(lane: Lane) -> None: ...


async def _begin(lane: Lane) -> None:
    await lane.begin(7)
    await lane.read()


@pytest.mark.parametrize(
    ("prepare", "misuse", "step_id", "message"),
    [
        (_nothing, lambda lane: lane.fill(5, 0, ROWS), 5, "step_id: is 5: no such step is under way"),
        (_nothing, lambda lane: lane.fill(0, 0, ROWS), 0, "step_id: is 0: no such step is under way"),
        (_begin, lambda lane: lane.begin(7), 7, "step 7 is under way"),
        (_begin, lambda lane: lane.fill(7, 1, ROWS), 7, "layer: is 1, the step waits for layer 0"),
        (_begin, lambda lane: lane.send(pb.StepRequest(step_id=7).SerializeToString()), 7, "payload: is missing"),
        (_begin, lambda lane: lane.fill(7, 0, ROWS[:-1]), 7, "payload: MoE output is"),
        (_begin, lambda lane: lane.fill(7, 0, ROWS.bfloat16()), 7, "payload: MoE output is torch.bfloat16"),
        (_begin, lambda lane: lane.fill(7, 0, ROWS, remaining_rows=100), 7, "remaining_rows: makes 107 rows"),
        (
            _begin,
            lambda lane: lane.fill(7, 0, torch.zeros(1, 10**5), remaining_rows=9),
            7,
            "payload.shape: .* 192 wide",
        ),
        (
            _nothing,
            lambda lane: lane.send(
                pb.StepRequest(step_id=0, payload={"dtype": 1, "shape": [2], "data": b"abc"}).SerializeToString()
            ),
            0,
            "payload.data: has 3 bytes",
        ),
        (_nothing, lambda lane: lane.begin(7, SequenceChunk((9999,), 0, (1,))), 7, "token_ids: holds 9999"),
        (_nothing, lambda lane: lane.begin(7, SequenceChunk(PROMPT * 8, 0, tuple(range(7)))), 7, "hold 56 tokens"),
    ],
)
def test_misuse_is_answered_and_the_lane_goes_on(
    tmp_path: Path, prepare: Any, misuse: Any, step_id: int, message: str
) -> None:
    async def main() -> None:
        async with worker(tmp_path) as (engine, channel):
            lane = Lane(engine, channel)
            await prepare(lane)
            await misuse(lane)
            error = await lane.failure(step_id)
            with pytest.raises(type(error), match=message):
                raise error
            await lane.check()
            assert outcome_count(engine, "failed") == 0, "none of it is our bug"

    asyncio.run(main())


def test_misuse_under_another_id_does_not_end_the_step(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(tmp_path) as (engine, channel):
            lane = Lane(engine, channel)
            await lane.begin(7)
            at, x_TD = await lane.read()
            await lane.begin(8)
            assert "step 7 is under way" in (await lane.failure(8)).message
            await lane.fill(8, 0, ROWS)
            assert "no such step" in (await lane.failure(8)).message
            for layer in range(CONFIG.num_layers):
                assert x_TD is not None
                await lane.fill(7, layer, moe().fill_now(layer, x_TD))
                at, x_TD = await lane.read()
            assert list(at.result.token_ids) == [FIRST_TOKEN]

    asyncio.run(main())


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b"\x08", bytes(100)])
def test_garbage_ends_the_stream_and_only_that(tmp_path: Path, garbage: bytes) -> None:
    async def main() -> None:
        async with worker(tmp_path) as (engine, channel):
            lane, other = Lane(engine, channel), Lane(engine, channel)
            await other.begin(1)
            _, x_TD = await other.read()
            await lane.begin(1, SequenceChunk(PROMPT, 0, (9,), GREEDY))
            await lane.read()
            await lane.send(garbage)
            assert await lane.status() is grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lane._call.read()
            assert isinstance(from_rpc_error(caught.value), InvalidRequest)
            for layer in range(CONFIG.num_layers):
                assert x_TD is not None
                await other.fill(1, layer, moe().fill_now(layer, x_TD))
                header, x_TD = await other.read()
            assert list(header.result.token_ids) == [FIRST_TOKEN]

    asyncio.run(main())


def test_a_caller_that_leaves_in_the_middle_of_a_step(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(tmp_path) as (engine, channel):
            closed: list[int] = []
            real_begin = engine.begin

            def begin(what: Any) -> Any:
                run = real_begin(what)
                real_close = run.close
                run.close = lambda: (closed.append(1), real_close())[1]  # type: ignore[method-assign]
                return run

            engine.begin = begin  # type: ignore[method-assign]
            for leave in (Lane.cancel, Lane.close):
                lane = Lane(engine, channel)
                await lane.begin(1)
                await lane.read()
                if (waiting := leave(lane)) is not None:
                    await waiting
                before = len(closed)
                async with asyncio.timeout(LIMIT):
                    while len(closed) == before:  # noqa: ASYNC110 - closing has no event
                        await asyncio.sleep(0.002)
            await Lane(engine, channel).check()

    asyncio.run(main())


def test_draining_finishes_the_step_under_way_and_begins_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        engine = attention_engine()
        service = AttentionService(engine)
        server = RoleServer([service.as_service()])
        channel = open_channel(await server.start(f"unix:{tmp_path}/socket"))
        idle, busy = Lane(engine, channel), Lane(engine, channel)
        await idle.check()
        await busy.begin(1)
        _, x_TD = await busy.read()
        stopping = asyncio.create_task(server.stop(LIMIT))
        assert await idle.status() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await idle.read()
        assert from_rpc_error(caught.value).reason is Reason.SHUTTING_DOWN
        for layer in range(CONFIG.num_layers):
            assert x_TD is not None
            await busy.fill(1, layer, moe().fill_now(layer, x_TD))
            header, x_TD = await busy.read()
        assert list(header.result.token_ids) == [FIRST_TOKEN]
        assert await busy.status() is grpc.StatusCode.UNAVAILABLE
        async with asyncio.timeout(LIMIT / 2):
            await stopping
        await channel.close(None)

    asyncio.run(main())


def test_a_plan_that_comes_while_draining_is_refused_and_said_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with worker(tmp_path) as (engine, channel):
            lane = Lane(engine, channel)
            await lane.check()
            (lane_there,) = SERVICES[engine]._lanes
            async with asyncio.timeout(LIMIT):
                while lane_there._reading is None:  # noqa: ASYNC110 - waiting for a message has no event
                    await asyncio.sleep(0.002)
            SERVICES[engine]._is_draining = True
            lane_there._is_draining = True  # the plan is on its way when the lane is told to end
            assert (await describe(channel, "")).draining
            await lane.begin(2)
            assert (await lane.failure(2)).reason is Reason.SHUTTING_DOWN
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lane.read()
            assert from_rpc_error(caught.value).reason is Reason.SHUTTING_DOWN
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await Lane(engine, channel).read()
            assert from_rpc_error(caught.value).reason is Reason.SHUTTING_DOWN

    asyncio.run(main())


class TestLease:
    def test_a_router_that_says_who_it_is_gets_the_incarnation(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with worker(tmp_path) as (engine, channel):
                found = await describe(channel, "one")
                assert found.incarnation == engine.incarnation == (await describe(channel, "one")).incarnation
                await Lane(engine, channel).check()

        asyncio.run(main())

    def test_the_second_router_is_told_who_holds_it(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with worker(tmp_path) as (engine, channel):
                await describe(channel, "one")
                await Lane(engine, channel).check()
                CLOCK.now += 9.9
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await describe(channel, "two")
                error = from_rpc_error(caught.value)
                assert isinstance(error, Unavailable)
                assert "leased by router one for 9.9 s" in error.message
                assert (await describe(channel, "")).incarnation == "", "who only asks takes nothing"
                await Lane(engine, channel).check()

        asyncio.run(main())

    @pytest.mark.parametrize("leave", [Lane.cancel, Lane.close])
    def test_it_is_free_a_moment_after_the_last_stream_has_ended(self, tmp_path: Path, leave: Any) -> None:
        async def main() -> None:
            async with worker(tmp_path) as (engine, channel):
                first = (await describe(channel, "one")).incarnation
                lanes = [Lane(engine, channel), Lane(engine, channel)]
                for lane in lanes:
                    await lane.check()
                CLOCK.now += 5
                for lane in lanes:
                    if (waiting := leave(lane)) is not None:
                        await waiting
                async with asyncio.timeout(LIMIT):
                    while SERVICES[engine]._lease.seconds_left != 1.0:  # noqa: ASYNC110 - closing has no event
                        await asyncio.sleep(0.002)
                CLOCK.now += 1.0
                second = (await describe(channel, "two")).incarnation
                assert second not in (first, "")
                await Lane(engine, channel).check()

        asyncio.run(main())

    def test_plans_and_steps_of_the_last_holder_are_refused(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with worker(tmp_path) as (engine, channel):
                await describe(channel, "one")
                late, in_step = Lane(engine, channel), Lane(engine, channel)
                old = plan(engine, CHUNK)
                await in_step.begin(1)
                _, x_TD = await in_step.read()
                assert x_TD is not None
                CLOCK.now += 10.0
                await describe(channel, "two")
                await in_step.fill(1, 0, moe().fill_now(0, x_TD))
                await late.send(tensors.encode(pb.StepRequest(step_id=2, plan=plan_to_proto(old))))
                for lane, step_id in ((in_step, 1), (late, 2)):
                    error = await lane.failure(step_id)
                    assert isinstance(error, FailedPrecondition)
                    assert error.reason is Reason.WRONG_INCARNATION
                await in_step.check()

        asyncio.run(main())

    def test_steps_keep_it(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with worker(tmp_path) as (engine, channel):
                await describe(channel, "one")
                lane = Lane(engine, channel)
                await lane.begin(1)
                for layer in range(CONFIG.num_layers):
                    _, x_TD = await lane.read()
                    assert x_TD is not None
                    CLOCK.now += 9.0
                    await lane.fill(1, layer, moe().fill_now(layer, x_TD))
                header, _ = await lane.read()
                assert header.HasField("result")
                with pytest.raises(grpc.aio.AioRpcError):
                    await describe(channel, "two")

        asyncio.run(main())


def test_a_sequence_that_is_not_finite_is_named_and_its_neighbours_go_on(tmp_path: Path) -> None:
    """A NaN in one sequence's MoE output, in the first layer and in the last."""

    async def main() -> None:
        async with worker(tmp_path) as (engine, channel):
            lane = Lane(engine, channel)
            sound, bad = SequenceChunk(PROMPT, 0, (1,), GREEDY), SequenceChunk(PROMPT, 0, (2,))
            for step_id, (at, other, expected) in enumerate(
                [
                    (0, bad, [1]),  # no logits are wanted of it: its keys and values are what is spoilt
                    (2, SequenceChunk(PROMPT, 0, (2,), GREEDY), [1]),
                    (None, bad, []),
                ]
            ):
                await lane.begin(step_id, sound, other)
                for layer in range(CONFIG.num_layers):
                    _, x_TD = await lane.read()
                    assert x_TD is not None
                    moe_TD = moe().fill_now(layer, x_TD)
                    if layer == at:
                        moe_TD[len(PROMPT) + 3 if layer == 0 else -1, 5] = float("nan")
                    await lane.fill(step_id, layer, moe_TD)
                header, _ = await lane.read()
                assert list(header.result.faulty_chunks) == expected
                assert header.result.token_ids[0] == FIRST_TOKEN

    asyncio.run(main())


def test_a_stage_takes_a_hidden_state_with_the_plan_and_gives_one_back(tmp_path: Path) -> None:
    """In as many messages as it takes; one that does not fit the plan is refused, and the lane goes on."""

    async def main() -> None:
        async with worker(tmp_path, range(1, 2)) as (engine, channel):
            lane, hidden_TD = Lane(engine, channel), torch.randn(len(PROMPT), CONFIG.hidden_size)

            async def begin(step_id: int, hidden_TD: torch.Tensor) -> None:
                header = pb.StepRequest(step_id=step_id, plan=plan_to_proto(plan(engine, CHUNK)))
                for message in tensors.encode_rows(header, hidden_TD, "step_id", 3 * 4 * CONFIG.hidden_size):
                    await lane.send(message)

            await lane.begin(1)
            assert "layer 1 goes on with a hidden state" in (await lane.failure(1)).message
            await begin(2, hidden_TD[1:])
            assert (await lane.failure(2)).field == "payload"
            await begin(3, hidden_TD)
            header, x_TD = await lane.read()
            assert header.layer == 1
            assert x_TD is not None
            await lane.fill(3, 1, torch.zeros_like(x_TD))
            header, left_TD = await lane.read()
            assert header.result == pb.StepResult(is_hidden_state=True)
            assert left_TD is not None
            assert (left_TD.shape, left_TD.dtype) == (hidden_TD.shape, torch.float32)
            assert not torch.equal(left_TD, hidden_TD), "attention has been added"

    asyncio.run(main())


def test_a_bug_fails_the_step_and_not_the_lane(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with worker(tmp_path) as (engine, channel):
            lane, real = Lane(engine, channel), engine._model._kernels

            def broken(*_: Any) -> None:
                raise ZeroDivisionError("x / 0")

            engine._model._kernels = types.SimpleNamespace(norm=broken)  # type: ignore[assignment]
            await lane.begin(3)
            assert "ZeroDivisionError" in (await lane.failure(3)).message
            engine._model._kernels = real
            await lane.check()
            assert outcome_count(engine, "failed") == 1
            assert device().call(lambda: "alive") == "alive"

    asyncio.run(main())
