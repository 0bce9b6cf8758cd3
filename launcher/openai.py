"""The OpenAI HTTP API: the gateway `smg` as a child process, in front of a server of ours."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from grokmoe.errors import ConfigError, StartupError, Unavailable
from grokmoe.logs import LogSettings
from grokmoe.settings import to_flags
from launcher.gateway import GatewaySettings
from launcher.process import RoleProcess

R = TypeVar("R")

DEFAULT_OPENAI_PORT = 8000

PACKAGES = ("smg", "smg_grpc_proto")
"""The gateway, and the messages by which it talks to the server."""

NEEDED_FILE = "tokenizer.json"
"""The gateway tokenises. It reads this file and the chat template in tokenizer_config.json."""

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}
"""Where what listens on all interfaces is reached from here."""


def check_can_start(model: str) -> None:
    """Raises ConfigError where there is no gateway, or a model that it cannot serve. model: checkpoint directory."""
    if any(importlib.util.find_spec(package) is None for package in PACKAGES):
        raise ConfigError("openai needs the gateway, which is not installed: pip install 'grokmoe[smg]'")
    if not (Path(model) / NEEDED_FILE).is_file():
        raise ConfigError(f"openai needs {Path(model) / NEEDED_FILE}, and there is no such file")


def free_port(host: str, port: int = 0) -> int:
    """A port that nobody listens on now, `port` if it is not 0. For programs that cannot choose one and say which.

    Raises StartupError if it is taken, or the host is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what listened here a moment ago is no hindrance
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            raise StartupError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        return int(probe.getsockname()[1])


def gateway_process(address: str, model: str, host: str, port: int, logs: LogSettings, traces: str = "") -> RoleProcess:
    """The gateway, not started. Once it is ready, its `address` is the base URL of the API.

    address: of the server, which need not serve yet. model: checkpoint directory. port: 0 for any free one. Raises
    StartupError for a port that is taken.
    """
    server_host, _, server_port = address.rpartition(":")
    settings = GatewaySettings(
        server=(f"{_LOOPBACK.get(server_host, server_host)}:{server_port}",),
        model=str(Path(model).resolve()),
        host=host,
        port=free_port(host, port),
        metrics_port=free_port(host),
        traces=traces,
        **logs.logs(),
    )
    return RoleProcess("openai", 0, "launcher.gateway", to_flags(settings))


async def serve_with(gateway: RoleProcess, serving: Coroutine[Any, Any, R]) -> R:
    """Runs a server with the gateway in front, until the server ends; prints `OPENAI <base URL>` once both serve.

    Returns what the server returns. Raises StartupError if the gateway cannot start, Unavailable if it ends first.
    """
    try:
        # First of all: a process that serves gRPC already had better not fork.
        await gateway.start()
    except BaseException:
        serving.close()
        raise
    server = asyncio.create_task(serving)
    front = asyncio.create_task(_front(gateway))
    try:
        await asyncio.wait((server, front), return_when=asyncio.FIRST_COMPLETED)
        if not server.done():
            await front
        return await server
    finally:
        for task in (front, server):
            task.cancel()
        await asyncio.gather(front, server, return_exceptions=True)
        await gateway.stop()


async def _front(gateway: RoleProcess) -> None:
    await gateway.wait_ready()
    print(f"OPENAI {gateway.address}", flush=True)
    code = await gateway.wait_ended()
    raise Unavailable(f"the OpenAI gateway ended with code {code}")
