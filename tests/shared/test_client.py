"""The SDK against a scripted server: what goes over the wire, what comes back, and how calls end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import grokmoe
from grokmoe import AsyncClient, Client, FinishReason, PipelineStage, results
from grokmoe.client import GENERATE_TIMEOUT
from tests.shared.client_calls import Ask, ask_async, ask_sync, in_background
from tests.shared.fake_generation import ERRORS, FakeServer

BOUND = 5.0
"""Seconds within which a cancellation must have reached the server."""


@pytest.fixture(params=[ask_sync, ask_async])
def ask(request: pytest.FixtureRequest) -> Ask:
    return request.param


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "grokmoe-client"] == []


USAGE = results.Usage(3, 2, 4)
TIMING = results.Timing(0.25, 0.5, 1.5)


def completion(request_id: str, finish_reason: FinishReason) -> results.Completion:
    """What the server answers to most."""
    candidate = results.Candidate(0, "Hello", (5, 6, 7, 8), (), finish_reason, None)
    return results.Completion(request_id, (candidate,), (), USAGE, TIMING)


def test_generate(server: FakeServer, ask: Ask) -> None:
    answer = ask(server.address, "generate", "hello")
    assert answer == completion("drawn", FinishReason.STOP)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("Hello", (5, 6, 7, 8), "stop")
    assert (answer.logprobs, answer.stopped_by) == ((), None)


def test_stream(server: FakeServer, ask: Ask) -> None:
    assert ask(server.address, "stream", "hello") == [
        results.Delta(0, "Hel", (5, 6), (), (), None, None, results.Usage(3, 2, 2), None),
        results.Delta(0, "", (7,), (), (), None, None, results.Usage(3, 2, 3), None),
        results.Delta(0, "lo", (8,), (), (), FinishReason.LENGTH, None, USAGE, TIMING),
    ]


def test_score(server: FakeServer, ask: Ask) -> None:
    judged = ask(server.address, "score", [7, 8, 9], top_logprobs=2, request_id="mine")
    assert (judged.request_id, judged.total_logprob) == ("mine", -3.0)
    assert [each.token_id for each in judged.logprobs] == [7, 8, 9]
    assert [each.logprob for each in judged.logprobs] == [None, -1.5, -1.5]
    assert (judged.usage, judged.timing) == (USAGE, TIMING)
    assert judged.perplexity == pytest.approx(math.exp(1.5))
    assert math.isnan(ask(server.address, "score", [7]).perplexity)


def test_tokenize_and_back(server: FakeServer, ask: Ask) -> None:
    assert ask(server.address, "tokenize", "abc") == results.Tokens((97, 98, 99), ("a", "b", "c"))
    assert ask(server.address, "detokenize", (97, 98, 99)) == "abc"


def test_abort(server: FakeServer, ask: Ask) -> None:
    assert ask(server.address, "abort", ["alive 1", "gone", "alive 2"]) == ("alive 1", "alive 2")
    assert ask(server.address, "abort", "gone") == ()
    assert list(server.generation.requests[1].request_ids) == ["gone"]


def test_model_and_status(server: FakeServer, ask: Ask) -> None:
    assert ask(server.address, "model") == results.ModelInfo(
        "tiny", "abc", 512, 64, 2, 8, 2, 32, (2, 9), True, "float32", 1
    )
    status = ask(server.address, "status")
    assert [(worker.role, worker.state) for worker in status.workers] == [
        ("attention", "ready"),
        ("expert", "suspect"),
        ("attention", "ready"),
        ("unknown", "unknown"),
    ]
    assert status.workers[1].experts == (0, 1)
    assert status.workers[0].used_pages == 4
    assert status.workers[2].stages == (
        PipelineStage("q:1", 0, 1, "cpu", "j"),
        PipelineStage("p:1", 1, 2, "cuda:0", "k"),
    )
    assert status.placement == (grokmoe.ExpertPlacement(1, (1, 0), 99, (90, 9)),)
    assert status.legs == (grokmoe.LegLatency("wire", 0.5, 6),)
    assert (status.waiting, status.running, status.steps, status.preemptions) == (1, 2, 3, 4)


def test_mistakes_in_the_call_itself(server: FakeServer, ask: Ask) -> None:
    with pytest.raises(TypeError, match=r"unknown option max_token$"):
        ask(server.address, "generate", "x", max_token=1)
    with pytest.raises(TypeError, match="not bytes"):
        ask(server.address, "stream", b"x")


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize("name", ERRORS)
def test_typed_errors(server: FakeServer, ask: Ask, method: str, name: str) -> None:
    expected = ERRORS[name]
    with pytest.raises(grokmoe.GrokmoeError) as caught:
        ask(server.address, method, name)
    assert type(caught.value) is type(expected)
    assert vars(caught.value) == vars(expected)  # message, field, retry_after


def test_a_code_outside_the_tree(server: FakeServer, ask: Ask) -> None:
    with pytest.raises(grokmoe.InternalError, match="DATA_LOSS: where is it"):
        ask(server.address, "generate", "data loss")


def test_finish_reasons_of_another_server(server: FakeServer, ask: Ask) -> None:
    assert ask(server.address, "generate", "aborted").finish_reason is FinishReason.ABORTED
    assert ask(server.address, "generate", "new reason").finish_reason is FinishReason.UNKNOWN
    for method in ("generate", "stream"):
        with pytest.raises(grokmoe.InternalError, match="without a finish reason"):
            ask(server.address, method, "no reason")
    with pytest.raises(grokmoe.InternalError, match="without a candidate"):
        ask(server.address, "generate", "no candidate")


def test_an_error_in_mid_stream_comes_after_its_deltas(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            stream = client.stream("breaks")
            assert (await anext(stream)).text == "Hel"
            with pytest.raises(grokmoe.Unavailable) as caught:
                await anext(stream)
            assert caught.value.retry_after == 0.5
            assert [delta async for delta in stream] == []
            with pytest.raises(grokmoe.Cancelled):
                await stream.completion()

    asyncio.run(main())
    with Client(server.address) as client:
        stream = client.stream("breaks")
        assert next(stream).text == "Hel"
        with pytest.raises(grokmoe.Unavailable):
            next(stream)
        assert list(stream) == []


def test_completion_of_a_stream(server: FakeServer) -> None:
    expected = completion("mine", FinishReason.LENGTH)
    with Client(server.address) as client:
        stream = client.stream("hello", request_id="mine")
        assert stream.request_id == ""
        next(stream)
        assert stream.request_id == "mine"
        assert stream.completion() == expected
        assert stream.completion() == expected

    async def main() -> None:
        async with AsyncClient(server.address) as client:
            assert await client.stream("hello", request_id="mine").completion() == expected

    asyncio.run(main())


def break_off(client: Client) -> None:
    for _ in client.stream("forever"):
        break


def leave_the_block(client: Client) -> None:
    with client.stream("forever") as stream:
        next(stream)


def close(client: Client) -> None:
    stream = client.stream("forever")
    next(stream)
    stream.close()
    stream.close()
    assert list(stream) == []
    with pytest.raises(grokmoe.Cancelled):
        stream.completion()


def fail_in_the_loop(client: Client) -> None:
    with contextlib.suppress(ZeroDivisionError):
        for _ in client.stream("forever"):
            raise ZeroDivisionError


def never_read(client: Client) -> None:
    stream = client.stream("forever")
    time.sleep(0.1)
    del stream


@pytest.mark.parametrize("leave", [break_off, leave_the_block, close, fail_in_the_loop, never_read])
def test_leaving_a_stream_cancels_at_the_server(server: FakeServer, leave: Callable[[Client], None]) -> None:
    with Client(server.address) as client:
        leave(client)
        assert server.generation.cancelled.wait(BOUND)


async def async_break_off(client: AsyncClient) -> None:
    async for _ in client.stream("forever"):
        break


async def async_leave_the_block(client: AsyncClient) -> None:
    async with client.stream("forever") as stream:
        await anext(stream)


async def async_close(client: AsyncClient) -> None:
    stream = client.stream("forever")
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    assert [delta async for delta in stream] == []


async def cancel_the_reader(client: AsyncClient) -> None:
    stream = client.stream("forever")
    await anext(stream)
    task = asyncio.ensure_future(stream.completion())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_a_generate(client: AsyncClient) -> None:
    task = asyncio.ensure_future(client.generate("forever"))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def time_out_a_generate(client: AsyncClient) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await client.generate("forever")


@pytest.mark.parametrize(
    "leave",
    [
        async_break_off,
        async_leave_the_block,
        async_close,
        cancel_the_reader,
        cancel_a_generate,
        time_out_a_generate,
    ],
)
def test_leaving_an_async_stream_cancels_at_the_server(server: FakeServer, leave: Callable[..., Any]) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client:
            await leave(client)
            assert await asyncio.to_thread(server.generation.cancelled.wait, BOUND)

    asyncio.run(main())


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_deadline_of_a_call(server: FakeServer, ask: Ask, method: str) -> None:
    begin = time.monotonic()
    with pytest.raises(grokmoe.DeadlineExceeded):
        ask(server.address, method, "forever", timeout=0.2)
    assert time.monotonic() - begin < BOUND
    assert server.generation.cancelled.wait(BOUND)


def test_every_generation_has_a_deadline(server: FakeServer, ask: Ask) -> None:
    ask(server.address, "generate", "hello")
    ask(server.address, "stream", "hello")
    with Client(server.address, timeout=33.0) as client:
        client.generate("hello")
        client.stream("hello").completion()
        client.generate("hello", timeout=7.0)
    expected = [GENERATE_TIMEOUT, GENERATE_TIMEOUT, 33.0, 33.0, 7.0]
    assert server.generation.deadlines == [pytest.approx(seconds, abs=5.0) for seconds in expected]


def test_nobody_there(ask: Ask, tmp_path: Any) -> None:
    address = f"unix:{tmp_path}/nobody"
    calls = {"generate": "x", "stream": "x", "score": "x", "tokenize": "x", "detokenize": [1], "abort": "x"}
    for method, args in {**{name: (arg,) for name, arg in calls.items()}, "model": (), "status": ()}.items():
        with pytest.raises(grokmoe.Unavailable) as caught:
            ask(address, method, *args)
        assert caught.value.retry_after > 0


def test_the_server_goes_in_mid_stream(server: FakeServer) -> None:
    with Client(server.address) as client:
        stream = client.stream("forever")
        next(stream)
        server.stop()
        with pytest.raises(grokmoe.Unavailable):
            next(stream)


def test_a_client_outlives_a_restart_of_its_server(tmp_path: Any) -> None:
    address = f"unix:{tmp_path}/socket"
    with Client(address) as client:
        with FakeServer(address):
            assert client.generate("hello").text == "Hello"
        with pytest.raises(grokmoe.Unavailable):
            client.generate("hello")
        with FakeServer(address):
            client.wait_ready(10)
            assert client.generate("hello").text == "Hello"


def test_wait_ready(server: FakeServer, ask: Ask) -> None:
    ask(server.address, "wait_ready", 10)
    server.set_serving(False)
    with pytest.raises(grokmoe.DeadlineExceeded, match=r"not ready after 0\.3 s: not serving"):
        ask(server.address, "wait_ready", 0.3)
    waiting = in_background(lambda: ask(server.address, "wait_ready", 10))
    time.sleep(0.2)
    assert not waiting.done()
    server.set_serving(True)
    waiting.result(timeout=BOUND)


def test_wait_ready_for_a_server_that_comes_late(ask: Ask, tmp_path: Any) -> None:
    address = f"unix:{tmp_path}/socket"
    with pytest.raises(grokmoe.DeadlineExceeded, match="connect"):
        ask(address, "wait_ready", 0.3)
    waiting = in_background(lambda: ask(address, "wait_ready", 10))
    time.sleep(0.3)
    with FakeServer(address):
        waiting.result(timeout=BOUND)


def test_two_clients_at_once(server: FakeServer) -> None:
    with Client(server.address) as one, Client(server.address) as two:
        held = one.stream("forever")
        next(held)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = pool.map(lambda n: (one, two)[n % 2].generate("hello", request_id=str(n)), range(40))
            assert [answer.request_id for answer in answers] == [str(n) for n in range(40)]
            texts = pool.map(lambda n: "".join(d.text for d in (one, two)[n % 2].stream("hello")), range(40))
            assert set(texts) == {"Hello"}
        assert not server.generation.cancelled.is_set()

    async def main() -> None:
        async with AsyncClient(server.address) as one, AsyncClient(server.address) as two:
            answers = await asyncio.gather(*((one, two)[n % 2].generate("hello") for n in range(40)))
            assert {answer.text for answer in answers} == {"Hello"}

    asyncio.run(main())


def test_closing_is_idempotent_and_final(server: FakeServer) -> None:
    client = Client(server.address)
    stream = client.stream("forever")
    next(stream)
    client.close()
    client.close()
    stream.close()
    assert server.generation.cancelled.wait(BOUND)
    calls = (lambda: client.generate("x"), lambda: client.stream("x"), lambda: client.score("x"))
    for call in (client.model, client.status, *calls):
        with pytest.raises(RuntimeError, match="closed"):
            call()

    async def main() -> None:
        client = AsyncClient(server.address)
        await client.model()
        await client.close()
        await client.close()
        with pytest.raises(RuntimeError, match="closed"):
            await client.model()
        with pytest.raises(RuntimeError, match="closed"):
            client.stream("x")
        with pytest.raises(RuntimeError, match="closed"):
            async with client:
                pass

    asyncio.run(main())


@pytest.mark.parametrize("method", ["generate", "stream", "wait_ready"])
def test_closing_ends_the_calls_of_other_threads(server: FakeServer, method: str) -> None:
    server.set_serving(False)
    client = Client(server.address)
    calls = {
        "generate": lambda: client.generate("forever"),
        "stream": lambda: client.stream("forever").completion(),
        "wait_ready": lambda: client.wait_ready(60),
    }
    running = in_background(calls[method])
    time.sleep(0.2)
    client.close()
    with pytest.raises(grokmoe.Cancelled):
        running.result(timeout=BOUND)


def test_closing_ends_the_calls_of_other_tasks(server: FakeServer) -> None:
    async def main() -> None:
        client = AsyncClient(server.address)
        calls = [asyncio.ensure_future(client.generate("forever"))]
        calls.append(asyncio.ensure_future(client.stream("forever").completion()))
        await asyncio.sleep(0.2)
        await client.close()
        for error in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(error, grokmoe.Cancelled)

    asyncio.run(main())


def test_closing_while_others_begin_calls(server: FakeServer) -> None:
    """Whatever the moment, every call ends: with an answer, Cancelled, or RuntimeError after the close."""
    for _ in range(20):
        client = Client(server.address)

        def call(client: Client = client) -> None:
            with contextlib.suppress(grokmoe.Cancelled, RuntimeError):
                while True:
                    client.model()

        running = [in_background(call) for _ in range(4)]
        time.sleep(0.01)
        client.close()
        for future in running:
            future.result(timeout=BOUND)


def test_an_async_client_belongs_to_one_loop(server: FakeServer) -> None:
    client = AsyncClient(server.address)
    asyncio.run(client.model())
    with pytest.raises(RuntimeError, match="event loop"):
        asyncio.run(client.model())


def test_dropped_streams_leave_nothing_behind(server: FakeServer) -> None:
    with Client(server.address) as client:
        for _ in range(20):
            next(client.stream("forever"))
        gc.collect()
        assert client.generate("hello").text == "Hello"


def test_a_process_may_end_without_closing(server: FakeServer) -> None:
    program = (
        "import sys, grokmoe\n"
        "client = grokmoe.Client(sys.argv[1])\n"
        "stream = client.stream('forever')\n"
        "print(next(stream).text)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, server.address], capture_output=True, text=True, timeout=30, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "Hel\n", "")
    assert server.generation.cancelled.wait(BOUND)


class PollerCompletionQueue:
    """Named like the gRPC class whose harmless error is kept out of the log."""

    def _handle_events(self) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")


def test_only_the_harmless_error_of_grpc_is_kept_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def bug() -> None:
        raise BlockingIOError(11, "of our own")

    with Client("127.0.0.1:1") as client:
        for callback in (PollerCompletionQueue()._handle_events, bug):
            client._thread._loop.call_soon_threadsafe(callback)
    logged = [log for log in caplog.records if log.name == "asyncio" and "PollerCompletionQueue" in log.getMessage()]
    assert logged == []
    assert "of our own" in caplog.text
