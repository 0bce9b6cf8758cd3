"""A process between the router and some workers that passes messages on, and spoils answers on command.

    python -m benchmarks.chaos.proxy --control unix:/c --routes unix:/a=unix:/b,...

A route is the address to serve on and the worker's. Calls pass as raw bytes, unary ones as streams of one message
each way, which on the wire they are. Commands are unary calls on the control address: JSON in, JSON out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from typing import Any

import grpc
import uvloop

from benchmarks.chaos.spoil import KINDS, Spoiling, spoilt
from grokmoe.channel import RECONNECT_OPTIONS, SERVER_OPTIONS, open_channel
from grokmoe.server import stop_signal

CONTROL = "chaos.Proxy"


class Route(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """One worker's stand-in. `spoiling` is what happens to its answers."""

    def __init__(self, listen: str, worker: str) -> None:
        self._listen, self._worker = listen, worker
        self._channel = open_channel(worker, RECONNECT_OPTIONS)
        self._server: grpc.aio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.spoiling = Spoiling()

    async def open(self) -> None:
        """Serves."""
        self._server = grpc.aio.server(options=list(SERVER_OPTIONS))
        self._server.add_generic_rpc_handlers((self,))
        self._server.add_insecure_port(self._listen)
        await self._server.start()

    async def drop(self) -> None:
        """Ends every connection and takes no new one."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)

    async def close(self) -> None:
        """Drops, and disconnects from the worker."""
        await self.drop()
        await self._channel.close(None)

    def service(self, details: Any) -> Any:
        """gRPC asks which handler a method has: the same for all."""
        method = details.method

        async def handle(requests: Any, context: Any) -> None:
            await self._pass(method, requests, context)

        return grpc.stream_stream_rpc_method_handler(handle)

    async def _pass(self, method: str, requests: Any, context: Any) -> None:
        untyped: Any = self._channel
        call = untyped.stream_stream(method)()
        up = asyncio.ensure_future(_pass_up(requests, call))
        writing = asyncio.Lock()
        try:
            while True:
                data = await call.read()
                if data is grpc.aio.EOF:  # type: ignore[attr-defined]
                    break
                await self._answer(method, bytes(data), context, writing)
            context.set_code(await call.code())
            context.set_details(await call.details())
            context.set_trailing_metadata(tuple(await call.trailing_metadata()))
        except grpc.aio.AioRpcError as error:
            context.set_code(error.code())
            context.set_details(error.details() or "")
        finally:
            up.cancel()
            call.cancel()

    async def _answer(self, method: str, data: bytes, context: Any, writing: asyncio.Lock) -> None:
        if not self.spoiling.take(method, data):
            await _write(context, [data], writing)
            return
        kind, seconds = self.spoiling.kind, self.spoiling.seconds
        messages = spoilt(kind, method, data)
        if kind == "late":  # others pass it
            task = asyncio.ensure_future(_write(context, messages, writing, seconds))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        await _write(context, messages, writing, seconds)


async def _pass_up(requests: Any, call: Any) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # who reads the call hears of its end
        async for data in requests:
            await call.write(data)
        await call.done_writing()


async def _write(context: Any, messages: list[bytes], writing: asyncio.Lock, seconds: float = 0.0) -> None:
    await asyncio.sleep(seconds)
    with contextlib.suppress(grpc.aio.AbortError, grpc.aio.UsageError, asyncio.InvalidStateError):  # the stream is over
        async with writing:
            for message in messages:
                await context.write(message)


class Proxy:
    """All routes and their control."""

    def __init__(self, routes: dict[str, str]) -> None:
        """routes: address to serve on -> the worker's."""
        self._routes = {listen: Route(listen, worker) for listen, worker in routes.items()}

    async def serve(self, control: str) -> None:
        """Until a signal comes or standard input closes."""
        stop = stop_signal(exit_on_stdin_eof=True)
        for route in self._routes.values():
            await route.open()
        server = grpc.aio.server(options=list(SERVER_OPTIONS))
        handlers = {
            "Set": grpc.unary_unary_rpc_method_handler(self._set),
            "Left": grpc.unary_unary_rpc_method_handler(self._left),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(CONTROL, handlers),))
        server.add_insecure_port(control)
        await server.start()
        print(f"READY {control}", flush=True)
        await stop.wait()
        await server.stop(None)
        for route in self._routes.values():
            await route.close()

    async def _set(self, data: bytes, context: Any) -> bytes:
        """{"route", "kind", "seconds", "count"} -> {"hits": answers the command before it has spoilt}."""
        command = json.loads(data)
        route, kind = self._routes[command["route"]], command["kind"]
        hits = route.spoiling.hits
        route.spoiling = Spoiling()
        if kind == "drop":
            await route.drop()
        elif kind == "open":
            await route.open()
        elif kind:
            assert kind in KINDS, kind
            route.spoiling = Spoiling(kind, command["seconds"], command["count"])
        return json.dumps({"hits": hits}).encode()

    async def _left(self, data: bytes, context: Any) -> bytes:
        """{"route"} -> {"left": answers that are still to be spoilt}."""
        return json.dumps({"left": self._routes[json.loads(data)["route"]].spoiling.left}).encode()


class ProxyControl:
    """The other end of the control address."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address, RECONNECT_OPTIONS)

    async def set(self, route: str, kind: str, seconds: float = 0.0, count: int = -1) -> int:
        """kind: one of KINDS, or `drop` its connections, `open` it again, or empty: pass everything on.

        count: answers to spoil; negative: all. Returns how many answers the command before this one has spoilt.
        """
        command = {"route": route, "kind": kind, "seconds": seconds, "count": count}
        return int((await self._call("Set", command))["hits"])

    async def left(self, route: str) -> int:
        """Answers that are still to be spoilt."""
        return int((await self._call("Left", {"route": route}))["left"])

    async def _call(self, method: str, command: dict[str, Any]) -> Any:
        untyped: Any = self._channel
        call = untyped.unary_unary(f"/{CONTROL}/{method}")
        return json.loads(await call(json.dumps(command).encode(), timeout=10.0, wait_for_ready=True))

    async def close(self) -> None:
        """Disconnects."""
        await self._channel.close(None)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--control", required=True, help="address that takes commands")
    parser.add_argument("--routes", required=True, help="LISTEN=WORKER, comma-separated")
    parser.add_argument("--exit-on-stdin-eof", action="store_true", help="always so; every role has this flag")
    options = parser.parse_args()
    routes = dict(route.split("=", 1) for route in options.routes.split(","))

    async def serve() -> None:
        await Proxy(routes).serve(options.control)

    uvloop.run(serve())


if __name__ == "__main__":
    main()
