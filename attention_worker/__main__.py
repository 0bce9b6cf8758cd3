"""`python -m attention_worker`: one attention worker as a process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import uvloop

from attention_worker.config import AttentionWorkerSettings
from attention_worker.loading import load_engine
from attention_worker.service import AttentionService
from grokmoe.device_thread import DeviceThread
from grokmoe.errors import StartupError
from grokmoe.server import ServerSettings, log_to_stderr, run
from grokmoe.settings import add_flags, from_namespace
from grokmoe.telemetry import AttentionMetrics, new_registry

DESCRIPTION = """\
Serves the attention half of a Grok-1 model: embedding, attention over a paged KV cache, norms, output head and
sampling. A router connects to it, keeps the ledger of its pages and fills in the experts' part of every layer.
Prints METRICS <address> and READY <address> on standard output when it can be used."""

EPILOG = """\
example:
  python -m attention_worker --model /models/grok-1 --listen 0.0.0.0:7001 --kv-gib 8
Every flag can be given as an environment variable: --kv-gib as GROKMOE_KV_GIB."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until SIGTERM. Returns the exit code: 1 with a message when it cannot start."""
    parser = argparse.ArgumentParser(
        "attention_worker",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    try:
        add_flags(parser.add_argument_group("worker"), AttentionWorkerSettings)
        add_flags(parser.add_argument_group("server"), ServerSettings)
        namespace = parser.parse_args(argv)
        worker = from_namespace(AttentionWorkerSettings, namespace)
        server = from_namespace(ServerSettings, namespace)
        log_to_stderr(server.log_level)
        registry = new_registry()
        engine = load_engine(worker, AttentionMetrics(registry), DeviceThread("attention-device"))
        uvloop.run(run(server, [AttentionService(engine).as_service()], registry))
    except StartupError as error:
        print(f"attention_worker: error: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
