"""`python -m launcher.gateway`: the gateway `smg` as a process that says READY and ends with its parent.

It runs what `smg launch` runs, with the flags that suit one server on the same machine, or several: cells that stand
behind one address.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import http.client
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from grokmoe.errors import GrokmoeError
from grokmoe.logs import LogSettings
from grokmoe.settings import add_flags, from_namespace, setting
from grokmoe.tracing import ExportSettings
from launcher.gateway_servers import follow
from router.discovery import Sources

READY_INTERVAL = 0.1
"""Pause between two looks whether it serves, seconds."""

_LOG_LEVELS = {"debug": "debug", "info": "warn", "warning": "warn", "error": "error"}
"""One step less than ours: at `info` every request has several lines."""


@dataclasses.dataclass(frozen=True)
class GatewaySettings(LogSettings, ExportSettings):
    """What the process takes."""

    server: tuple[str, ...] = setting(
        ["127.0.0.1:50051"],
        "servers of one model, comma-separated: host:port, dns:///name:port for every address of a name, or file:PATH "
        "for a file of addresses that is watched",
        metavar="ADDRESSES",
    )
    model: str = setting(
        "", "directory with tokenizer.json and tokenizer_config.json; empty: a server is asked for them", metavar="DIR"
    )
    host: str = setting("127.0.0.1", "host to serve on")
    port: int = setting(8000, "port to serve on")
    metrics_port: int = setting(29000, "port of the gateway's own Prometheus endpoint")
    grace: int = setting(2, "seconds that running requests get after SIGTERM")
    exit_on_stdin_eof: bool = setting(False, "end when standard input closes")


ONE_SERVER: Mapping[str, Any] = {"policy": "round_robin"}
"""There is nothing to balance, and a refusal is not worth another try."""

SEVERAL_SERVERS: Mapping[str, Any] = {
    # A prompt goes where its beginning has been computed, unless that one is much busier.
    "policy": "cache_aware",
    # What ends is noticed before the next request, and what comes back is used again at once. A request that the one
    # refuses, or takes down with it, goes to another: nothing has come of it yet.
    "health-check-interval-secs": 1,
    "health-check-timeout-secs": 5,
    "health-failure-threshold": 2,
    "health-success-threshold": 1,
    "retry-max-retries": 5,
}


def smg_flags(settings: GatewaySettings, manifest: Path | None = None) -> list[str]:
    """The command line of `smg launch`. manifest: the file that has the servers, if they may change."""
    several = manifest is not None or len(settings.server) > 1
    flags = {
        "host": settings.host.strip("[]"),
        "port": settings.port,
        "prometheus-host": settings.host.strip("[]"),
        "prometheus-port": settings.metrics_port,
        "log-level": _LOG_LEVELS[settings.log_level],
        **(SEVERAL_SERVERS if several else ONE_SERVER),
        "history-backend": "none",
        "worker-startup-check-interval": 1,
        "shutdown-grace-period-secs": settings.grace,
        # Who can reach the API must not be able to add or remove servers: a key that nobody knows.
        "control-plane-api-keys": f"nobody:nobody:admin:{secrets.token_urlsafe(32)}",
    }
    switches = [*([] if several else ["--disable-retries"]), *(["--log-json"] if settings.log_format == "json" else [])]
    if settings.traces:
        # The gateway's span is the parent of the router's. It has none of calls that it would not log.
        switches.append("--enable-trace")
        flags["log-level"] = "debug" if settings.log_level == "debug" else "info"
        flags["otlp-traces-endpoint"] = settings.traces.partition("://")[2]
    if settings.model:
        flags["model-path"] = settings.model
    if manifest is not None:
        flags |= {"discovery-provider": "file", "discovery-file": manifest, "discovery-check-interval-secs": 5}
    words = [f"--{name}={value}" for name, value in flags.items()]
    if manifest is None:
        words += ["--worker-urls", *(f"grpc://{address}" for address in settings.server)]
    return ["launch", *switches, *words]


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM."""
    parser = argparse.ArgumentParser("gateway", description="Serves the OpenAI HTTP API in front of a server.")
    add_flags(parser, GatewaySettings)
    settings = from_namespace(GatewaySettings, parser.parse_args(argv))
    try:
        manifest = _followed(settings)
    except GrokmoeError as error:
        parser.error(error.message)
    # Standard output is for the READY line; what the gateway prints goes where logs go.
    ready = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_say_ready, args=(settings, ready), daemon=True).start()
    if settings.exit_on_stdin_eof:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    os.environ["NO_COLOR"] = "1"
    from smg.cli import main as smg

    smg(smg_flags(settings, manifest))
    return 0


def _followed(settings: GatewaySettings) -> Path | None:
    """A file with the servers, kept up to date as long as this process lives; None: they are always the same.

    Raises ConfigError for what is no address.
    """
    sources = Sources(settings.server)
    if not sources.may_change:
        return None
    folder = tempfile.mkdtemp(prefix="grokmoe-gateway-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "servers.json"
    follow(sources, path)
    return path


def _say_ready(settings: GatewaySettings, ready: TextIO) -> None:
    while not _is_ready(settings.host.strip("[]"), settings.port):
        time.sleep(READY_INTERVAL)
    print(f"METRICS {settings.host}:{settings.metrics_port}", file=ready)
    print(f"READY http://{settings.host}:{settings.port}/v1", file=ready, flush=True)


def _is_ready(host: str, port: int) -> bool:
    """Whether the gateway serves and has a server behind it."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/readiness")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
