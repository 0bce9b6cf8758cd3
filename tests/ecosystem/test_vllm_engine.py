"""vllm.grpc.engine.VllmEngine over a real server, called as a gateway calls it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

pytest.importorskip("smg_grpc_proto")

from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

import router.vllm_engine
from grokmoe.channel import open_channel
from grokmoe.server import RoleServer
from grokmoe.status import from_rpc_error
from launcher.paths import DEMO_MODEL
from router.engine import Engine
from router.service import GenerationService
from router.vllm_engine import vllm_engine_service
from router.vllm_engine.tokenizer_bundle import CHUNK_BYTES, in_chunks
from tests import goldens
from tests.router.tiny import CONFIG, attention_link, golden_tokens, serving, until

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}


@dataclasses.dataclass
class Served:
    engine: Engine
    stub: Any
    channel: Any

    async def generate(self, request: vllm.GenerateRequest) -> list[vllm.GenerateResponse]:
        return [message async for message in self.stub.Generate(request)]

    @property
    def num_used_pages(self) -> int:
        return sum(cell.scheduler.ledger.num_used for cell in self.engine.cells)

    @property
    def is_idle(self) -> bool:
        return not (self.engine.num_running or self.engine.num_waiting or self.num_used_pages)


@contextlib.asynccontextmanager
async def served(directory: Path = goldens.DIRECTORY, **options: Any) -> AsyncIterator[Served]:
    async with serving(attention_link(), **options) as engine:
        generation = GenerationService(engine, None, "tiny", "float32")
        service = vllm_engine_service(generation, engine, "tiny", "float32", directory)
        assert service is not None
        server = RoleServer([service])
        channel = open_channel(await server.start("127.0.0.1:0"))
        await server.set_ready(True)
        try:
            yield Served(engine, vllm_engine_pb2_grpc.VllmEngineStub(channel), channel)
        finally:
            await channel.close(None)
            await server.stop(0)


def request(prompt: str = "len33", stream: bool = False, request_id: str = "", **params: Any) -> vllm.GenerateRequest:
    return vllm.GenerateRequest(
        request_id=request_id,
        tokenized=vllm.TokenizedInput(input_ids=goldens.PROMPTS[prompt]),
        sampling_params=vllm.SamplingParams(**{**GREEDY, **params}),
        stream=stream,
    )


def endless(request_id: str, stream: bool = True) -> vllm.GenerateRequest:
    """A request that ends for one of the reasons tested here or when the context is full, hundreds of steps later."""
    message = request("len7", stream, request_id)
    message.sampling_params.ClearField("max_tokens")
    return message


def test_tokens_are_the_golden_ones_at_once_and_as_a_stream() -> None:
    async def main() -> None:
        async with served() as there:
            expected = golden_tokens("len33")
            (message,) = await there.generate(request())
            assert list(message.complete.output_ids) == expected
            assert message.complete.finish_reason == "length"
            assert message.complete.prompt_tokens == 33
            *chunks, last = await there.generate(request(stream=True))
            assert [token for each in chunks for token in each.chunk.token_ids] == expected
            assert list(last.complete.output_ids) == expected
            assert last.complete.completion_tokens == 16
            assert last.complete.cached_tokens > 0  # the first request's prefix
            await until(lambda: there.is_idle)

    asyncio.run(main())


def test_candidates_and_logprobs() -> None:
    async def main() -> None:
        async with served() as there:
            drawn = {"temperature": 1, "seed": 5, "n": 3, "max_tokens": 6, "logprobs": 2, "prompt_logprobs": 1}
            messages = await there.generate(request("len7", **drawn))
            assert [message.complete.index for message in messages] == [0, 1, 2]
            assert len({tuple(message.complete.output_ids) for message in messages}) > 1
            for message in messages:
                logprobs, prompt = message.complete.output_logprobs, message.complete.input_logprobs
                assert logprobs.token_ids == message.complete.output_ids
                assert [len(top.values) for top in logprobs.top_logprobs] == [2] * 6
                assert all(value <= 0 for value in logprobs.token_logprobs)
                assert list(prompt.token_ids) == goldens.PROMPTS["len7"]
                assert [each.HasField("value") for each in prompt.token_logprobs] == [False] + [True] * 6
            streamed = await there.generate(request("len7", stream=True, **drawn))
            joined: dict[int, list[int]] = {0: [], 1: [], 2: []}
            for message in streamed:
                if message.HasField("chunk"):
                    joined[message.chunk.index] += message.chunk.token_ids
            assert list(joined.values()) == [list(message.complete.output_ids) for message in messages]

    asyncio.run(main())


def test_a_stop_token_is_told() -> None:
    async def main() -> None:
        async with served() as there:
            third = golden_tokens("len33")[2]
            (message,) = await there.generate(request(stop_token_ids=[third]))
            complete = message.complete
            assert complete.finish_reason == "stop"
            assert complete.matched_token_id == third
            assert list(complete.output_ids) == golden_tokens("len33")[: golden_tokens("len33").index(third) + 1]

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_cancelled_call_frees_its_pages(stream: bool) -> None:
    async def main() -> None:
        async with served() as there:
            call = there.stub.Generate(endless("a", stream))
            await until(lambda: there.num_used_pages > 0)
            call.cancel()
            steps = there.engine.report.num_steps
            await until(lambda: there.is_idle)
            assert there.engine.report.num_steps - steps < 50

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_abort_ends_the_stream_and_frees_its_pages(stream: bool) -> None:
    async def main() -> None:
        async with served() as there:
            waiting = asyncio.create_task(there.generate(endless("a", stream)))
            other = asyncio.create_task(there.generate(endless("b", stream)))
            await until(lambda: there.engine.num_running == 2)
            await there.stub.Abort(vllm.AbortRequest(request_ids=["unknown", "a"]))
            complete = (await waiting)[-1].complete
            assert complete.finish_reason == "abort"
            assert there.engine.num_running == 1
            await there.stub.Abort(vllm.AbortRequest(request_ids=["a", "b"]))
            steps = there.engine.report.num_steps
            assert (await other)[-1].complete.finish_reason == "abort"
            await until(lambda: there.is_idle)
            assert there.engine.report.num_steps - steps <= 1  # the one in flight

    asyncio.run(main())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_p": 1.5}, "sampling_params.top_p: is 1.5"),
        ({"max_tokens": 0}, "sampling_params.max_tokens: is 0"),
        ({"stop_token_ids": [CONFIG.vocab_size]}, "sampling_params.stop_token_ids: holds"),
        ({"structural_tag": "x"}, "sampling_params.structural_tag: is not supported"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(changes: dict[str, Any], words: str) -> None:
    async def main() -> None:
        async with served() as there:
            with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT") as caught:
                await there.generate(request(**changes))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert words in caught.value.details()
            assert from_rpc_error(caught.value).field == words.partition(":")[0]

    asyncio.run(main())


def test_without_input_it_is_refused() -> None:
    async def main() -> None:
        async with served() as there:
            with pytest.raises(grpc.aio.AioRpcError, match="input: is missing"):
                await there.generate(vllm.GenerateRequest())

    asyncio.run(main())


def test_what_it_says_of_itself() -> None:
    async def main() -> None:
        async with served() as there:
            model = await there.stub.GetModelInfo(vllm.GetModelInfoRequest())
            assert model.served_model_name == "tiny"
            assert model.is_generation
            assert model.vocab_size == CONFIG.vocab_size
            assert model.max_context_length == CONFIG.context_length
            assert Path(model.tokenizer_path) == goldens.DIRECTORY.resolve()
            assert model.architectures
            server = await there.stub.GetServerInfo(vllm.GetServerInfoRequest())
            assert (server.server_type, server.data_parallel_size) == ("grokmoe", 1)
            assert (server.model_dtype, server.block_size) == ("torch.float32", 8)
            assert server.last_receive_timestamp == 0
            health = await there.stub.HealthCheck(vllm.HealthCheckRequest())
            assert health.healthy
            by_name = health_pb2_grpc.HealthStub(there.channel)
            answer = await by_name.Check(health_pb2.HealthCheckRequest(service="vllm.grpc.engine.VllmEngine"))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

    asyncio.run(main())


def test_load_follows_the_requests() -> None:
    async def main() -> None:
        async with served(max_running=1) as there:
            calls = [there.stub.Generate(endless(name)) for name in "ab"]
            await until(lambda: there.num_used_pages > 0 and there.engine.num_waiting == 1)
            (load,) = (await there.stub.GetLoads(vllm.GetLoadsRequest(include=["core"]))).loads
            assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (1, 1, 2)
            assert load.max_total_num_tokens == 64 * 8
            assert load.token_usage == pytest.approx(load.num_used_tokens / load.max_total_num_tokens)
            assert 0 < load.token_usage < 1
            assert load.utilization == 1
            for call in calls:
                call.cancel()
            await until(lambda: there.is_idle)
            (load,) = (await there.stub.GetLoads(vllm.GetLoadsRequest())).loads
            assert (load.num_total_reqs, load.num_used_tokens) == (0, 0)

    asyncio.run(main())


def test_there_is_one_rank() -> None:
    async def main() -> None:
        async with served() as there:
            assert (await there.stub.GetLoads(vllm.GetLoadsRequest(dp_rank=0))).dp_rank_count == 1
            with pytest.raises(grpc.aio.AioRpcError, match="dp_rank: is 1"):
                await there.stub.GetLoads(vllm.GetLoadsRequest(dp_rank=1))

    asyncio.run(main())


def test_flush_forgets_prefixes_when_idle_only() -> None:
    async def main() -> None:
        async with served() as there:
            await there.generate(request())
            call = there.stub.Generate(endless("a"))
            await until(lambda: there.num_used_pages > 0)
            refused = await there.stub.FlushCache(common.FlushCacheRequest())
            assert not refused.success
            assert "1 sequences are alive" in refused.message
            waiting = asyncio.ensure_future(there.stub.FlushCache(common.FlushCacheRequest(timeout_s=30)))
            call.cancel()
            assert (await waiting).success
            assert all(cell.scheduler.ledger.num_cached == 0 for cell in there.engine.cells)
            (message,) = await there.generate(request())
            assert message.complete.cached_tokens == 0
            assert list(message.complete.output_ids) == golden_tokens("len33")

    asyncio.run(main())


def test_the_tokenizer_comes_in_pieces_with_a_digest() -> None:
    async def main() -> None:
        async with served(DEMO_MODEL) as there:
            chunks = [chunk async for chunk in there.stub.GetTokenizer(common.GetTokenizerRequest())]
            data = b"".join(chunk.data for chunk in chunks)
            assert [chunk.sha256 for chunk in chunks] == [""] * (len(chunks) - 1) + [hashlib.sha256(data).hexdigest()]
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                assert set(archive.namelist()) == {"tokenizer.json", "tokenizer_config.json", "config.json"}
                assert archive.read("tokenizer.json") == (DEMO_MODEL / "tokenizer.json").read_bytes()

    asyncio.run(main())


@pytest.mark.parametrize("size", [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
def test_the_digest_is_in_the_last_piece_only(size: int) -> None:
    data = bytes(number % 251 for number in range(size))
    pieces, digests = zip(*in_chunks(data), strict=True)
    assert b"".join(pieces) == data
    assert all(0 < len(piece) <= CHUNK_BYTES for piece in pieces)
    assert list(digests) == [""] * (len(pieces) - 1) + [hashlib.sha256(data).hexdigest()]


def test_without_a_tokenizer_there_is_none_to_fetch() -> None:
    async def main() -> None:
        async with served() as there:
            with pytest.raises(grpc.aio.AioRpcError, match="FAILED_PRECONDITION"):
                async for _ in there.stub.GetTokenizer(common.GetTokenizerRequest()):
                    pass

    asyncio.run(main())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("Embed", vllm.EmbedRequest()),
        ("StartProfile", common.StartProfileRequest()),
        ("StopProfile", common.StopProfileRequest()),
        ("SubscribeKvEvents", common.SubscribeKvEventsRequest()),
    ],
)
def test_what_is_not_there_says_so(method: str, message: Any) -> None:
    async def main() -> None:
        async with served() as there:
            call = getattr(there.stub, method)(message)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (call.read() if method == "SubscribeKvEvents" else call)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert f"{method} is not supported" in caught.value.details()

    asyncio.run(main())


def test_every_method_of_theirs_is_answered() -> None:
    async def main() -> None:
        async with serving(attention_link()) as engine:
            generation = GenerationService(engine, None, "tiny", "float32")
            service = vllm_engine_service(generation, engine, "tiny", "float32", goldens.DIRECTORY)
            assert service is not None
            assert set(service.handlers) == set(vllm.DESCRIPTOR.services_by_name["VllmEngine"].methods_by_name)

    asyncio.run(main())


def test_without_the_messages_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.vllm_engine, "PROTO_PACKAGE", "no_such_package")
    nothing: Any = None
    assert vllm_engine_service(nothing, nothing, "tiny", "float32", goldens.DIRECTORY) is None
