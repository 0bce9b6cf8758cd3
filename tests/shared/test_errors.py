"""Errors over real calls: what a server raises is what either kind of client catches."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from grokmoe import errors
from grokmoe.errors import GrokmoeError, InvalidRequest
from grokmoe.status import ERROR_DOMAIN, MAX_STATUS_MESSAGE_BYTES, from_failure, from_rpc_error, to_failure, to_status

METHOD = "/test.Errors/Fail"
TREE = [
    InvalidRequest("sampling.top_p", "1.5 is not in (0, 1]"),
    InvalidRequest("", "no prompt"),
    InvalidRequest("a", "a: said twice"),
    errors.NotFound("no such model"),
    errors.ResourceExhausted("queue full", retry_after=2.25),
    errors.ResourceExhausted("queue full", retry_after=0.0),
    errors.Unauthenticated("who are you?"),
    errors.PermissionDenied("not you"),
    errors.FailedPrecondition("another incarnation: 'ä', 漢, \n, %41"),
    errors.Unavailable("worker 3 is missing", retry_after=0.001),
    errors.DeadlineExceeded("too late"),
    errors.Cancelled("given up"),
    errors.InternalError("a bug"),
]


class Server:
    """Fails its only method with `context` calls set by the test."""

    def __init__(self) -> None:
        self.fail: Callable[[Any], Any] = lambda context: None
        self.address = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()
        assert self._ready.wait(10)

    async def _main(self) -> None:
        async def handler(request: bytes, context: Any) -> bytes:
            await self.fail(context)
            return b""

        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handlers = {"Fail": grpc.unary_unary_rpc_method_handler(handler)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Errors", handlers),))
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._stop.wait()
        await server.stop(None)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def catch_sync(address: str, timeout: float = 10) -> grpc.RpcError:
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(METHOD)(b"", timeout=timeout)
    return caught.value


def catch_sync_stream(address: str, timeout: float = 10) -> grpc.RpcError:
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.unary_stream(METHOD)(b"", timeout=timeout))
    return caught.value


def catch_aio(address: str, timeout: float = 10) -> grpc.RpcError:
    async def main() -> grpc.RpcError:
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await channel.unary_unary(METHOD)(b"", timeout=timeout)
            return caught.value

    return asyncio.run(main())


@pytest.fixture(params=[catch_sync, catch_sync_stream, catch_aio])
def catch(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("error", TREE, ids=lambda error: type(error).__name__)
def test_a_call_carries_the_error(server: Server, catch: Any, error: GrokmoeError) -> None:
    server.fail = lambda context: context.abort_with_status(to_status(error))
    found = from_rpc_error(catch(server.address))
    assert type(found) is type(error)
    assert vars(found) == vars(error)
    assert str(found) == str(error)


@pytest.mark.parametrize("character", ["a", "é", "漢", "\n"])
def test_a_long_message_is_cut_and_keeps_its_code(server: Server, catch: Any, character: str) -> None:
    error = InvalidRequest("text", character * 20_000)
    server.fail = lambda context: context.abort_with_status(to_status(error))
    found = from_rpc_error(catch(server.address))
    assert isinstance(found, InvalidRequest)
    assert found.field == "text"
    assert found.description.startswith(character * 200)
    assert found.description.endswith("...")
    assert len(found.message.encode()) <= MAX_STATUS_MESSAGE_BYTES


def test_a_message_that_is_no_unicode_text_is_still_sent(server: Server, catch: Any) -> None:
    server.fail = lambda context: context.abort_with_status(to_status(errors.NotFound("\ud800 here")))
    assert from_rpc_error(catch(server.address)).message == "? here"


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_code_has_its_class(server: Server, catch: Any, code: grpc.StatusCode) -> None:
    server.fail = lambda context: context.abort(code, "plain")
    found = from_rpc_error(catch(server.address))
    if found.code == code.value[0]:
        assert str(found) == "plain"
    else:
        assert isinstance(found, errors.InternalError)
        assert str(found) == f"{code.name}: plain"


@pytest.mark.parametrize("details", [b"\xff\xff", b"\x08\x05\x12\x05other", b""])
def test_details_of_another_status_do_not_hide_the_error(server: Server, catch: Any, details: bytes) -> None:
    async def fail(context: Any) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        await context.abort(grpc.StatusCode.NOT_FOUND, "the real one")

    server.fail = fail
    found = from_rpc_error(catch(server.address))
    assert isinstance(found, errors.NotFound)
    assert found.message == "the real one"


def test_errors_that_the_client_makes_itself(server: Server, catch: Any, tmp_path: Any) -> None:
    assert isinstance(from_rpc_error(catch(f"unix:{tmp_path}/nobody")), errors.Unavailable)
    server.fail = lambda context: asyncio.sleep(5)
    assert isinstance(from_rpc_error(catch(server.address, timeout=0.1)), errors.DeadlineExceeded)


def test_other_languages_find_the_standard_details(server: Server) -> None:
    def unpacked(error: GrokmoeError, kind: Any) -> Any:
        server.fail = lambda context: context.abort_with_status(to_status(error))
        status = rpc_status.from_call(catch_sync(server.address))
        for detail in status.details:
            found = kind()
            if detail.Unpack(found):
                return found
        return None

    invalid, full = InvalidRequest("a.b", "is wrong"), errors.ResourceExhausted("full", 2.5)
    violation = unpacked(invalid, error_details_pb2.BadRequest).field_violations[0]
    assert (violation.field, violation.description) == ("a.b", "is wrong")
    assert unpacked(full, error_details_pb2.RetryInfo).retry_delay.ToTimedelta().total_seconds() == 2.5
    info = unpacked(full, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == ("RESOURCE_EXHAUSTED", ERROR_DOMAIN)


@pytest.mark.parametrize("error", TREE, ids=lambda error: type(error).__name__)
def test_a_stream_carries_the_failure_of_one_request(error: GrokmoeError) -> None:
    found = from_failure(to_failure(error))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert getattr(found, "field", None) == getattr(error, "field", None)


def test_a_failure_outside_the_tree_is_our_bug() -> None:
    found = from_failure(to_failure(ZeroDivisionError("x / 0")))
    assert isinstance(found, errors.InternalError)
    assert found.message == "ZeroDivisionError: x / 0"


@pytest.mark.parametrize("error", [*TREE, errors.ConfigError("no")], ids=lambda error: type(error).__name__)
def test_errors_pass_between_processes(error: GrokmoeError) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error)
    assert vars(found) == vars(error)


def test_the_drawn_tree_is_the_tree() -> None:
    names = {
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, GrokmoeError) and not name.startswith("_")
    }
    drawn = [line.lstrip(" │├└─").split()[0] for line in errors.__doc__.splitlines() if "──" in line]
    assert {*drawn, "GrokmoeError"} == names
