"""`python -m router`: the router as a process, its workers behind gRPC."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch

from grokmoe.errors import ConfigError
from grokmoe.logs import say
from grokmoe.role import run_role
from grokmoe.server import ServerSettings, run
from grokmoe.telemetry import RouterMetrics, new_registry
from router.config import RouterSettings
from router.discovery import Sources, pipelines
from router.loading import build_engine, build_services, expose, load_model
from router.membership import Membership
from router.status_page import status_pages
from router.transport.grpc_attention import attention_link
from router.transport.pair_expert import expert_links
from router.transport.worker_access import WorkerAccess

DESCRIPTION = """\
Serves text generation (grokmoe.v1.Generation) with the attention and expert workers at the addresses given. Waits for
them at start and refuses workers that serve another model. Prints METRICS <address> and READY <address> on standard
output when it can be used, progress on standard error."""

EPILOG = """\
example:
  python -m router --model /models/grok-1 --listen 0.0.0.0:7000 \\
      --attention attention-0:7001 --experts expert-0:7002,expert-1:7002
Every flag can be given as an environment variable: --max-running as GROKMOE_MAX_RUNNING."""


async def serve(settings: RouterSettings, server: ServerSettings) -> None:
    """Loads, connects, serves until a signal comes. Raises StartupError, Unavailable when workers stay away."""
    torch.set_num_threads(settings.threads)
    if not settings.attention:
        raise ConfigError("attention is empty: name at least one attention worker")
    if not settings.experts:
        raise ConfigError("experts is empty: name at least one expert worker")
    model, registry, access = load_model(settings), new_registry(), WorkerAccess(settings)
    metrics = RouterMetrics(registry)
    sources = Sources(settings.attention, pipelines), Sources(settings.experts)
    attention, experts = [await each.first(settings.join_timeout) for each in sources]
    open_attention, open_expert = partial(attention_link, access=access), expert_links(settings, access, metrics)
    attention_links, links = [open_attention(each) for each in attention], [open_expert(each) for each in experts]
    engine = build_engine(model, settings, attention_links, metrics, links)
    expose(registry, model, engine, settings)
    membership = Membership(engine, (sources[0], attention), (sources[1], experts), open_attention, open_expert)

    async def join() -> None:
        await engine.start(say)
        membership.start()

    try:
        services = build_services(model, engine, settings)
        pages = status_pages(engine, model.name)
        await run(server, services, registry, before_ready=join, readiness=engine.on_serving, pages=pages)
    finally:
        membership.stop()
        await engine.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until SIGTERM. Returns the exit code: 1 with a message when it cannot start."""
    return run_role("router", DESCRIPTION, EPILOG, RouterSettings, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
