"""Bounds of the queue: the books alone, the engine that keeps to them, and callers over the wire."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from grokmoe.errors import ConfigError, Reason, ResourceExhausted
from grokmoe.v1 import generation_pb2 as pb
from router.admission import MAX_RETRY, MIN_RETRY, Admission, AdmissionSettings, CallContext
from tests.router.served import service
from tests.router.tiny import attention_link, golden_request, golden_tokens, serving, tokens_of, until


def refusal(settings: AdmissionSettings, *asked: object) -> ResourceExhausted:
    admission = Admission(settings)
    with pytest.raises(ResourceExhausted) as caught:
        admission.check(*asked)  # type: ignore[arg-type]
    assert admission.num_refused == 1
    return caught.value


class TestBounds:
    def test_sequences(self) -> None:
        settings = AdmissionSettings(max_waiting=4)
        error = refusal(settings, "a", 3, 1, 2, 2, 1000)
        assert error.reason is Reason.QUEUE_FULL
        Admission(settings).check("a", 2, 1, 2, 2, 1000)

    def test_tokens_in_multiples_of_the_pages(self) -> None:
        settings = AdmissionSettings(max_waiting_kv=2.0)
        error = refusal(settings, "a", 1, 101, 5, 1900, 1000)
        assert error.reason is Reason.QUEUE_FULL
        assert "limit of 2000" in error.message
        Admission(settings).check("a", 1, 100, 5, 1900, 1000)
        Admission(settings).check("a", 1, 3000, 0, 0, 1000)

    def test_one_caller(self) -> None:
        admission = Admission(AdmissionSettings(max_live_per_caller=2))
        admission.added("a", 2)
        with pytest.raises(ResourceExhausted) as caught:
            admission.check("a", 1, 1, 0, 0, 1000)
        assert caught.value.reason is Reason.CALLER_LIMIT
        admission.check("b", 2, 1, 0, 0, 1000)
        admission.ended("a")
        admission.check("a", 1, 1, 0, 0, 1000)
        admission.ended("a")
        assert admission.live_of("a") == 0

    def test_the_retry_hint_follows_the_pace(self) -> None:
        settings = AdmissionSettings(max_waiting=100)

        def hint(interval: float) -> float:
            admission = Admission(settings)
            for index in range(50):
                admission.begun(index * interval)
            with pytest.raises(ResourceExhausted) as caught:
                admission.check("a", 1, 1, 100, 100, 1000)
            return caught.value.retry_after

        assert hint(0.01) == pytest.approx(0.5, rel=0.1)
        assert hint(0.1) == pytest.approx(5.0, rel=0.1)
        assert (hint(0.00001), hint(100.0)) == (MIN_RETRY, MAX_RETRY)

    @pytest.mark.parametrize(
        "changes",
        [{"max_waiting": 0}, {"max_waiting_kv": 0.0}, {"max_live_per_caller": -1}, {"queue_timeout": float("nan")}],
    )
    def test_settings_that_cannot_be(self, changes: dict[str, float]) -> None:
        with pytest.raises(ConfigError, match=next(iter(changes))):
            AdmissionSettings(**changes)  # type: ignore[arg-type]


class TestEngine:
    def test_a_modest_caller_is_not_behind_a_greedy_one(self) -> None:
        async def main() -> None:
            async with serving(attention_link(), max_running=1) as engine:
                order: list[str] = []

                async def ask(caller: str) -> None:
                    generation = engine.submit(golden_request("len7", max_tokens=4), CallContext(caller))
                    await tokens_of(generation)
                    order.append(caller)

                greedy = [asyncio.create_task(ask("greedy")) for _ in range(8)]
                await until(lambda: engine.num_running == 1)
                await asyncio.gather(asyncio.create_task(ask("modest")), *greedy)
                assert order.index("modest") <= 2

        asyncio.run(main())

    def test_a_request_that_waits_too_long_is_refused_after_all(self) -> None:
        async def main() -> None:
            admission = AdmissionSettings(queue_timeout=0.05)
            async with serving(attention_link(), max_running=1, admission=admission) as engine:
                running = engine.submit(golden_request("len7", max_tokens=400))
                await running.take()
                waiting = engine.submit(golden_request("len1"))
                with pytest.raises(ResourceExhausted, match=r"waited 0\.\d s") as caught:
                    await tokens_of(waiting)
                assert caught.value.reason is Reason.QUEUE_TIMEOUT
                engine.cancel(running)
                assert await tokens_of(engine.submit(golden_request("len7"))) == golden_tokens("len7")

        asyncio.run(main())

    def test_books_are_even_when_all_is_over(self) -> None:
        async def main() -> None:
            async with serving(attention_link()) as engine:
                call = CallContext("somebody", priority=1)
                done = engine.submit(golden_request("len7", n=3), call)
                left = engine.submit(golden_request("len7", request_id="left"), call)
                engine.abort("left")
                engine.cancel(left)
                while engine.num_running + engine.num_waiting:
                    await done.take()
                assert engine.admission.live_of("somebody") == 0

        asyncio.run(main())


class TestCallers:
    def test_metadata_names_caller_and_priority(self) -> None:
        async def main() -> None:
            async with service(admission=AdmissionSettings(max_live_per_caller=1)) as served:
                request = pb.GenerateRequest(
                    token_ids=pb.TokenIds(ids=[1]), stopping=pb.StoppingParams(max_tokens=400, ignore_eos=True)
                )
                stream = served.stub.StreamGenerate(
                    pb.StreamGenerateRequest(generate=request), metadata=(("x-caller", "one"), ("x-priority", "2"))
                )
                await stream.read()
                with pytest.raises(grpc.aio.AioRpcError, match="of this caller"):
                    await served.stub.Generate(request, metadata=(("x-caller", "one"),))
                request.stopping.max_tokens = 2
                await served.stub.Generate(request, metadata=(("x-caller", "two"),))
                for bad in ("3", "high", ""):
                    with pytest.raises(grpc.aio.AioRpcError, match="x-priority") as caught:
                        await served.stub.Generate(request, metadata=(("x-priority", bad),))
                    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                with pytest.raises(grpc.aio.AioRpcError, match="x-caller"):
                    await served.stub.Generate(request, metadata=(("x-caller", "x" * 129),))

        asyncio.run(main())

    def test_what_is_refused_costs_nothing_first(self) -> None:
        async def main() -> None:
            admission = AdmissionSettings(max_waiting=1)
            async with service(admission=admission, max_running=1) as served:
                running = served.engine.submit(golden_request("len7", max_tokens=400))
                await running.take()
                waiting = served.engine.submit(golden_request("len7"))
                # Text that would be refused for its length, were it looked at.
                request = pb.GenerateRequest(text="x" * 300_000)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await served.stub.Generate(request)
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "wait already" in str(caught.value.details())
                served.engine.cancel(running)
                served.engine.cancel(waiting)

        asyncio.run(main())

    def test_a_deadline_is_known(self) -> None:
        async def main() -> None:
            async with service() as served:
                request = pb.GenerateRequest(
                    token_ids=pb.TokenIds(ids=[1]), stopping=pb.StoppingParams(max_tokens=400, ignore_eos=True)
                )
                stream = served.stub.StreamGenerate(pb.StreamGenerateRequest(generate=request), timeout=20)
                await stream.read()
                (generation,) = served.engine._register.generations
                assert generation.call.deadline is not None
                assert 0 < generation.call.deadline - time.monotonic() <= 21  # on the wire it is rounded up
                stream.cancel()

        asyncio.run(main())
