"""`python -m launcher.gateway`: the gateway `smg` as a process that says READY and ends with its parent.

It runs what `smg launch` runs, with the flags that a single server on the same machine needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import TextIO

from grokmoe.logs import LOG_LEVELS
from grokmoe.settings import add_flags, from_namespace, setting

READY_INTERVAL = 0.1
"""Pause between two looks whether it serves, seconds."""

SHUTDOWN_GRACE = 2
"""Seconds that running requests get after SIGTERM; the server behind ends its calls by then."""

_LOG_LEVELS = {"debug": "debug", "info": "warn", "warning": "warn", "error": "error"}
"""One step less than ours: at `info` every request has several lines."""


@dataclasses.dataclass(frozen=True)
class GatewaySettings:
    """What the process takes."""

    server: str = setting("127.0.0.1:50051", "address of the server", metavar="ADDRESS")
    model: str = setting("", "directory with tokenizer.json and tokenizer_config.json", metavar="DIR")
    host: str = setting("127.0.0.1", "host to serve on")
    port: int = setting(8000, "port to serve on")
    metrics_port: int = setting(29000, "port of the gateway's own Prometheus endpoint")
    log_level: str = setting("info", "what is logged to standard error", choices=LOG_LEVELS)
    exit_on_stdin_eof: bool = setting(False, "end when standard input closes")


def smg_flags(settings: GatewaySettings) -> list[str]:
    """The command line of `smg launch`."""
    flags = {
        "host": settings.host.strip("[]"),
        "port": settings.port,
        "worker-urls": f"grpc://{settings.server}",
        "model-path": settings.model,
        "prometheus-host": settings.host.strip("[]"),
        "prometheus-port": settings.metrics_port,
        "log-level": _LOG_LEVELS[settings.log_level],
        # There is one server: nothing to balance, nothing to remember, and a refusal is not worth another try.
        "policy": "round_robin",
        "history-backend": "none",
        "worker-startup-check-interval": 1,
        "shutdown-grace-period-secs": SHUTDOWN_GRACE,
        # Who can reach the API must not be able to add or remove servers: a key that nobody knows.
        "control-plane-api-keys": f"nobody:nobody:admin:{secrets.token_urlsafe(32)}",
    }
    return ["launch", "--disable-retries", *(f"--{name}={value}" for name, value in flags.items())]


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM."""
    parser = argparse.ArgumentParser("gateway", description="Serves the OpenAI HTTP API in front of a server.")
    add_flags(parser, GatewaySettings)
    settings = from_namespace(GatewaySettings, parser.parse_args(argv))
    # Standard output is for the READY line; what the gateway prints goes where logs go.
    ready = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_say_ready, args=(settings, ready), daemon=True).start()
    if settings.exit_on_stdin_eof:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    os.environ["NO_COLOR"] = "1"
    from smg.cli import main as smg

    smg(smg_flags(settings))
    return 0


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
