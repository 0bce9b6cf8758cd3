"""grokmoe.v1.Generation over a real server: what clients of either kind see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from grokmoe import FinishReason
from grokmoe.errors import DeadlineExceeded, InvalidRequest, ResourceExhausted, Unavailable
from grokmoe.v1 import generation_pb2 as pb
from router.admission import AdmissionSettings
from router.experts import ExpertPoolSettings
from router.service import SERVICE
from tests import goldens
from tests.router.served import TOKENIZER, service
from tests.router.tiny import CONFIG, ExpertDouble, attention_link, golden_tokens, until

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}


def test_unary_streaming_raw_and_sdk_agree() -> None:
    async def main() -> None:
        async with service() as served:
            text = "naïve café"
            done = await served.client.generate(text, seed=11, max_tokens=30, ignore_eos=True, request_id="mine")
            deltas = [delta async for delta in served.client.stream(text, seed=11, max_tokens=30, ignore_eos=True)]
            request = pb.GenerateRequest(
                text=text,
                sampling=pb.SamplingParams(seed=11),
                stopping=pb.StoppingParams(max_tokens=30, ignore_eos=True),
            )
            raw = await served.stub.Generate(request)
            parts = [part async for part in served.stub.StreamGenerate(pb.StreamGenerateRequest(generate=request))]
            assert done.text == TOKENIZER.decode(done.token_ids)
            assert done.request_id == "mine"
            assert raw.request_id not in ("", parts[0].request_id), "drawn"
            (candidate,) = raw.candidates
            streamed = "".join(part.text_delta for part in parts)
            assert candidate.text == streamed == "".join(delta.text for delta in deltas) == done.text
            assert tuple(candidate.token_ids) == done.token_ids == sum((delta.token_ids for delta in deltas), ())
            assert [part.finish_reason for part in parts[:-1]] == [0] * (len(parts) - 1)
            assert parts[-1].finish_reason == pb.FINISH_REASON_LENGTH
            assert parts[-1].usage.completion_tokens == raw.usage.completion_tokens == 30

    asyncio.run(main())


@pytest.mark.parametrize("prompt", [*goldens.PROMPTS])
def test_token_ids_in_golden_tokens_out(prompt: str) -> None:
    async def main() -> None:
        async with service(tokenizer=None) as served:
            done = await served.client.generate(goldens.PROMPTS[prompt], **GREEDY)
            assert list(done.token_ids) == golden_tokens(prompt)
            assert done.text == ""
            assert done.finish_reason is FinishReason.LENGTH
            assert done.usage.prompt_tokens == len(goldens.PROMPTS[prompt])
            assert done.usage.completion_tokens == 16
            assert 0 <= done.timing.queue_seconds <= done.timing.first_token_seconds <= done.timing.total_seconds
            assert done.timing.total_seconds > 0

    asyncio.run(main())


def test_usage_counts_cached_tokens_and_grows_in_a_stream() -> None:
    async def main() -> None:
        async with service() as served:
            first = await served.client.generate(goldens.PROMPTS["len33"], **GREEDY)
            assert first.usage.cached_tokens == 0
            counts = []
            async for delta in served.client.stream(goldens.PROMPTS["len33"], **GREEDY):
                counts.append(delta.usage.completion_tokens)
                assert delta.usage.cached_tokens == 32
            assert counts == sorted(set(counts))
            assert counts[-1] == 16

    asyncio.run(main())


def test_finish_reasons() -> None:
    async def main() -> None:
        async with service() as served:
            golden = golden_tokens("len7")
            stop = golden[2]
            assert stop not in golden[:2]
            done = await served.client.generate(goldens.PROMPTS["len7"], **GREEDY, stop_token_ids=[stop])
            assert done.finish_reason is FinishReason.STOP
            assert list(done.token_ids) == golden[:3], "the stop token is part of the ids"
            assert done.text == TOKENIZER.decode(golden[:2]), "and not of the text"
            last = await served.client.generate(goldens.PROMPTS["len7"], **{**GREEDY, "max_tokens": 4})
            assert last.finish_reason is FinishReason.LENGTH
            assert last.text == TOKENIZER.decode(golden[:4])

    asyncio.run(main())


def test_the_model_s_end_of_sequence_ends_and_can_be_ignored() -> None:
    async def main() -> None:
        golden = golden_tokens("len7")
        async with service(model={"eos_token_ids": (golden[2],)}) as served:
            ended = await served.client.generate(goldens.PROMPTS["len7"], temperature=0, max_tokens=16)
            assert (list(ended.token_ids), ended.finish_reason) == (golden[:3], FinishReason.STOP)
            ignored = await served.client.generate(goldens.PROMPTS["len7"], **GREEDY)
            assert list(ignored.token_ids) == golden

    asyncio.run(main())


def test_the_context_ends_a_text() -> None:
    async def main() -> None:
        async with service(attention=attention_link(num_pages=80)) as served:
            prompt = [5] * (CONFIG.context_length - 3)
            done = await served.client.generate(prompt, temperature=0, max_tokens=1000, ignore_eos=True)
            assert done.usage.completion_tokens == 3
            assert done.finish_reason is FinishReason.LENGTH

    asyncio.run(main())


def test_seeds() -> None:
    async def main() -> None:
        async with service() as served:

            async def draw(seed: int | None) -> tuple[int, ...]:
                return (await served.client.generate("abc", seed=seed, max_tokens=12, ignore_eos=True)).token_ids

            same, again, other, *free = await asyncio.gather(*map(draw, (1, 1, 2, None, None)))
            assert same == again != other
            assert free[0] != free[1]

    asyncio.run(main())


class TestErrors:
    def test_a_bad_request_names_its_field(self) -> None:
        async def main() -> None:
            async with service() as served:
                with pytest.raises(InvalidRequest) as caught:
                    await served.client.generate("a", top_p=1.5)
                assert caught.value.field == "sampling.top_p"
                with pytest.raises(grpc.aio.AioRpcError) as raw:
                    await served.stub.Generate(pb.GenerateRequest())
                assert raw.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                details = rpc_status.from_call(raw.value).details
                violations = error_details_pb2.BadRequest()
                assert any(detail.Unpack(violations) for detail in details)
                assert violations.field_violations[0].field == "prompt"
                stream = served.client.stream([CONFIG.vocab_size])
                with pytest.raises(InvalidRequest, match=r"token_ids\.ids"):
                    await stream.completion()

        asyncio.run(main())

    def test_full_means_resource_exhausted_with_a_retry_hint(self) -> None:
        async def main() -> None:
            async with service(admission=AdmissionSettings(max_waiting=1), max_running=1) as served:
                running = served.client.stream([1], max_tokens=400, ignore_eos=True)
                await anext(running)
                waiting = asyncio.create_task(served.client.generate([1], **GREEDY))
                await until(lambda: served.engine.num_waiting == 1)
                with pytest.raises(ResourceExhausted) as caught:
                    await served.client.generate([1], **GREEDY)
                assert caught.value.retry_after > 0
                await running.aclose()
                assert list((await waiting).token_ids) == list((await served.client.generate([1], **GREEDY)).token_ids)

        asyncio.run(main())

    def test_missing_experts_mean_unavailable_in_the_middle_of_a_stream(self) -> None:
        async def main() -> None:
            link = ExpertDouble()
            quick = ExpertPoolSettings(replica_wait=0.1, probe_interval=0.01)
            async with service(expert_links=[link], pool_settings=quick) as served:
                stream = served.client.stream([1], max_tokens=400, ignore_eos=True)
                await anext(stream)
                link.is_up = False
                with pytest.raises(Unavailable, match="no worker holds expert"):
                    await stream.completion()
                assert served.engine.num_running == 0

        asyncio.run(main())

    def test_a_deadline_frees_the_request(self) -> None:
        async def main() -> None:
            link = ExpertDouble()
            patient = ExpertPoolSettings(replica_wait=0.5, probe_interval=0.01)
            async with service(expert_links=[link], pool_settings=patient) as served:
                link.is_up = False
                # The router waits for a replica until that deadline, so either end may be the first to give up.
                with pytest.raises((DeadlineExceeded, Unavailable)):
                    await served.client.generate([1], timeout=0.1)
                await until(lambda: served.engine.num_running + served.engine.num_waiting == 0)
                link.is_up = True
                assert list((await served.client.generate(goldens.PROMPTS["len7"], **GREEDY)).token_ids) == (
                    golden_tokens("len7")
                )

        asyncio.run(main())


class TestClientsThatLeave:
    @pytest.mark.parametrize("how", ["cancel", "close", "unary"])
    def test_pages_come_free_within_a_step(self, how: str) -> None:
        async def main() -> None:
            async with service() as served:
                ledger, report = served.engine.cells[0].scheduler.ledger, served.engine.report
                request = pb.GenerateRequest(
                    token_ids=pb.TokenIds(ids=[1] * 20), stopping=pb.StoppingParams(max_tokens=400, ignore_eos=True)
                )
                if how == "unary":
                    call = served.stub.Generate(request)
                    await until(lambda: ledger.num_used > 0)
                    call.cancel()
                else:
                    call = served.stub.StreamGenerate(pb.StreamGenerateRequest(generate=request))
                    await call.read()
                    if how == "cancel":
                        call.cancel()
                    else:
                        await served.channel.close(None)
                await until(lambda: served.engine.num_running == 0)
                num_steps = report.num_steps
                await until(lambda: ledger.num_used == 0)
                assert report.num_steps <= num_steps + 1
                served.engine.check()

        asyncio.run(main())

    def test_a_client_that_never_reads(self) -> None:
        async def main() -> None:
            async with service() as served:
                request = pb.GenerateRequest(
                    token_ids=pb.TokenIds(ids=[1]), stopping=pb.StoppingParams(max_tokens=60, ignore_eos=True)
                )
                calls = [served.stub.StreamGenerate(pb.StreamGenerateRequest(generate=request)) for _ in range(3)]
                await until(lambda: served.engine.report.num_steps > 30)
                for call in calls:
                    call.cancel()
                await until(lambda: served.engine.num_running + served.engine.num_waiting == 0)

        asyncio.run(main())


def test_what_is_served_and_how_it_goes() -> None:
    async def main() -> None:
        async with service(attention=attention_link(num_pages=40), expert_links=[ExpertDouble()]) as served:
            await served.client.generate("hello", max_tokens=3, ignore_eos=True)
            model = await served.client.model()
            assert (model.name, model.dtype, model.config_hash) == ("tiny", "float32", CONFIG.content_hash)
            assert (model.vocab_size, model.context_length, model.num_layers) == (512, 512, 3)
            assert (model.num_experts, model.experts_per_token, model.eos_token_ids) == (8, 2, (2,))
            assert model.has_tokenizer
            status = await served.client.status()
            attention, experts = status.workers
            assert (attention.role, attention.state, attention.num_pages) == ("attention", "ready", 40)
            assert (experts.role, experts.state, experts.experts) == ("expert", "ready", tuple(range(8)))
            assert [placement.workers for placement in status.placement] == [(0,)] * 8
            assert sum(placement.rows for placement in status.placement) == (5 + 2) * 3 * 2
            assert all(sum(placement.layer_rows) == placement.rows for placement in status.placement)
            by_layer = zip(*(placement.layer_rows for placement in status.placement), strict=True)
            assert [sum(rows) for rows in by_layer] == [(5 + 2) * 2] * 3
            assert (status.waiting, status.running, status.preemptions) == (0, 0, 0)
            assert status.steps == 3
            assert {leg.leg for leg in status.legs} >= {"attention", "gate", "wire", "expert", "combine"}

    asyncio.run(main())


def test_health_and_reflection() -> None:
    async def main() -> None:
        async with service() as served:
            health = health_pb2_grpc.HealthStub(served.channel)

            async def check(name: str) -> int:
                return int((await health.Check(health_pb2.HealthCheckRequest(service=name))).status)

            serving_, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
            assert (await check(""), await check(SERVICE)) == (serving_, serving_)
            await served.server.set_ready(False)
            assert (await check(""), await check(SERVICE)) == (serving_, not_serving)
            await served.server.set_ready(True)
            with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
                await check("no.such.Service")

            async def ask() -> AsyncIterator[Any]:
                yield reflection_pb2.ServerReflectionRequest(list_services="")

            reflection = reflection_pb2_grpc.ServerReflectionStub(served.channel)
            async for answer in reflection.ServerReflectionInfo(ask()):
                names = {listed.name for listed in answer.list_services_response.service}
                assert {SERVICE, "grpc.health.v1.Health"} <= names

    asyncio.run(main())
