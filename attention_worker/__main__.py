"""`python -m attention_worker`: one attention worker as a process."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Sequence

from attention_worker.config import AttentionWorkerSettings
from attention_worker.lease import Lease
from attention_worker.loading import load_engine
from attention_worker.service import AttentionService
from attention_worker.tensor_parallel import follow, leading
from grokmoe.device_thread import DeviceThread
from grokmoe.role import run_role
from grokmoe.server import ServerSettings, run
from grokmoe.telemetry import AttentionMetrics, new_registry
from grokmoe.tracing import Tracing

DESCRIPTION = """\
Serves the attention half of a Grok-1 model: embedding, attention over a paged KV cache, norms, output head and
sampling. A router connects to it, keeps the ledger of its pages and fills in the experts' part of every layer.
Prints METRICS <address> and READY <address> on standard output when it can be used."""

EPILOG = """\
example:
  python -m attention_worker --model /models/grok-1 --listen 0.0.0.0:7001 --kv-gib 8
  python -m attention_worker --model /models/grok-1 --listen 0.0.0.0:7001 --device cuda --tensor-parallel 8
Every flag can be given as an environment variable: --kv-gib as GROKMOE_KV_GIB."""


async def serve(settings: AttentionWorkerSettings, server: ServerSettings) -> None:
    """Loads, then serves until a signal comes. A rank but the first serves the first. Raises StartupError."""
    if settings.rank:
        await follow(settings, server)
        return
    registry = new_registry()
    metrics, device = AttentionMetrics(registry), DeviceThread("attention-device")
    with contextlib.ExitStack() as stack:
        if settings.tensor_parallel > 1:
            engine = stack.enter_context(leading(settings, server, metrics, device))
        else:
            engine = load_engine(settings, metrics, device)
        tracing = Tracing.open(settings, "grokmoe-attention-worker")
        service = AttentionService(engine, Lease(engine.incarnation, settings.lease_seconds), tracing)
        try:
            await run(server, [service.as_service()], registry)
        finally:
            if tracing is not None:
                await asyncio.to_thread(tracing.close)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until SIGTERM. Returns the exit code: 1 with a message when it cannot start."""
    return run_role("attention_worker", DESCRIPTION, EPILOG, AttentionWorkerSettings, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
