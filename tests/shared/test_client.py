"""The SDK against a scripted server: what goes over the wire, what comes back, and how calls end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import grokmoe
from grokmoe import AsyncClient, Client, FinishReason, results
from grokmoe.client import GENERATE_TIMEOUT
from grokmoe.v1 import generation_pb2 as pb
from tests.shared.fake_generation import ERRORS, FakeServer

BOUND = 5.0
"""Seconds within which a cancellation must have reached the server."""

Ask = Callable[..., Any]


def ask_sync(address: str, method: str, *args: Any, **options: Any) -> Any:
    with Client(address) as client:
        answer = getattr(client, method)(*args, **options)
        return list(answer) if method == "stream" else answer


def ask_async(address: str, method: str, *args: Any, **options: Any) -> Any:
    async def main() -> Any:
        async with AsyncClient(address) as client:
            answer = getattr(client, method)(*args, **options)
            return [delta async for delta in answer] if method == "stream" else await answer

    return asyncio.run(main())


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


def in_background(call: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    """Runs a blocking call in a thread."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def main() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=main).start()
    return future


USAGE = results.Usage(3, 2, 4)
TIMING = results.Timing(0.25, 0.5, 1.5)


def test_generate(server: FakeServer, ask: Ask) -> None:
    expected = results.Completion("drawn", "Hello", (5, 6, 7, 8), FinishReason.STOP, USAGE, TIMING)
    assert ask(server.address, "generate", "hello") == expected
    assert expected.finish_reason == "stop"


def test_stream(server: FakeServer, ask: Ask) -> None:
    assert ask(server.address, "stream", "hello") == [
        results.Delta("Hel", (5, 6), None, results.Usage(3, 2, 2), None),
        results.Delta("", (7,), None, results.Usage(3, 2, 3), None),
        results.Delta("lo", (8,), FinishReason.LENGTH, USAGE, TIMING),
    ]


def test_model_and_status(server: FakeServer, ask: Ask) -> None:
    assert ask(server.address, "model") == results.ModelInfo(
        "tiny", "abc", 512, 64, 2, 8, 2, 32, (2, 9), True, "float32"
    )
    status = ask(server.address, "status")
    assert [(worker.role, worker.state) for worker in status.workers] == [
        ("attention", "ready"),
        ("expert", "suspect"),
        ("unknown", "unknown"),
    ]
    assert status.workers[1].experts == (0, 1)
    assert status.workers[0].used_pages == 4
    assert status.placement == (results.ExpertPlacement(1, (1, 0), 99),)
    assert status.legs == (results.LegLatency("wire", 0.5, 6),)
    assert (status.waiting, status.running, status.steps, status.preemptions) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (results.Usage, pb.Usage),
        (results.Timing, pb.Timing),
        (results.Completion, pb.GenerateResponse),
        (results.ModelInfo, pb.GetModelResponse),
        (results.Worker, pb.Worker),
        (results.ExpertPlacement, pb.ExpertPlacement),
        (results.LegLatency, pb.LegLatency),
        (results.Status, pb.GetStatusResponse),
    ],
)
def test_results_have_every_field_of_their_message(kind: type, message: Any) -> None:
    assert [field.name for field in dataclasses.fields(kind)] == [field.name for field in message.DESCRIPTOR.fields]
    assert kind.__dataclass_params__.frozen


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_unset_stays_unset_on_the_wire(server: FakeServer, ask: Ask, method: str) -> None:
    unset = dict.fromkeys(grokmoe.GenerateOptions.__annotations__)
    ask(server.address, method, "hello")
    ask(server.address, method, "hello", **{**unset, "stop_token_ids": ()})
    for request in server.generation.requests:
        assert request.SerializeToString() == pb.GenerateRequest(text="hello").SerializeToString()


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_what_is_set_is_sent_even_where_it_is_zero(server: FakeServer, ask: Ask, method: str) -> None:
    zeros = {"temperature": 0.0, "top_k": 0, "top_p": 0.0, "seed": 0}
    ask(server.address, method, "", max_tokens=0, ignore_eos=False, **zeros)
    ask(server.address, method, (1, 2), max_tokens=5, stop_token_ids=[7], request_id="mine", seed=2**64 - 1)
    first, second = server.generation.requests
    assert first == pb.GenerateRequest(
        text="", sampling=pb.SamplingParams(**zeros), stopping=pb.StoppingParams(max_tokens=0, ignore_eos=False)
    )
    assert second == pb.GenerateRequest(
        request_id="mine",
        token_ids=pb.TokenIds(ids=[1, 2]),
        sampling=pb.SamplingParams(seed=2**64 - 1),
        stopping=pb.StoppingParams(max_tokens=5, stop_token_ids=[7]),
    )


def test_an_empty_list_of_ids_is_left_to_the_server(server: FakeServer, ask: Ask) -> None:
    ask(server.address, "generate", [])
    assert server.generation.requests[0].WhichOneof("prompt") == "token_ids"


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("x", {"max_tokens": -1}, "stopping.max_tokens"),
        ("x", {"top_k": 2**32}, "sampling.top_k"),
        ("x", {"seed": -1}, "sampling.seed"),
        ("x", {"stop_token_ids": [-1]}, "stopping.stop_token_ids"),
        ([1, -1], {}, "token_ids"),
        ("\ud800", {}, "text"),
    ],
)
def test_what_no_message_can_carry(server: FakeServer, ask: Ask, prompt: Any, options: Any, field: str) -> None:
    with pytest.raises(grokmoe.InvalidRequest) as caught:
        ask(server.address, "generate", prompt, **options)
    assert caught.value.field == field
    assert server.generation.requests == []


def test_mistakes_in_the_call_itself(server: FakeServer, ask: Ask) -> None:
    with pytest.raises(TypeError, match="max_token"):
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
    with pytest.raises(grokmoe.InternalError, match="UNAUTHENTICATED: who are you"):
        ask(server.address, "generate", "unauthenticated")


def test_finish_reasons_of_another_server(server: FakeServer, ask: Ask) -> None:
    assert ask(server.address, "generate", "new reason").finish_reason is FinishReason.UNKNOWN
    for method in ("generate", "stream"):
        with pytest.raises(grokmoe.InternalError, match="without a finish reason"):
            ask(server.address, method, "no reason")


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
    expected = results.Completion("mine", "Hello", (5, 6, 7, 8), FinishReason.LENGTH, USAGE, TIMING)
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
    for method, args in {"generate": ("x",), "stream": ("x",), "model": (), "status": ()}.items():
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
    for call in (client.model, client.status, lambda: client.generate("x"), lambda: client.stream("x")):
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
