"""How a role becomes a process: flags, log, event loop, and one line instead of a traceback when it cannot start."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import uvloop

from grokmoe.errors import GrokmoeError
from grokmoe.logs import complain, log_to_stderr
from grokmoe.server import ServerSettings
from grokmoe.settings import add_flags, from_namespace

S = TypeVar("S")


def run_role(
    name: str,
    description: str,
    epilog: str,
    kind: type[S],
    serve: Callable[[S, ServerSettings], Awaitable[None]],
    argv: Sequence[str] | None = None,
) -> int:
    """Parses `kind` and ServerSettings from the command line and serves until SIGTERM.

    Returns the exit code: 1, with a message on standard error, for an error that was foreseen.
    """
    parser = argparse.ArgumentParser(
        name, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    try:
        add_flags(parser.add_argument_group(name.replace("_", " ")), kind)
        add_flags(parser.add_argument_group("server"), ServerSettings)
        namespace = parser.parse_args(argv)
        settings, server = from_namespace(kind, namespace), from_namespace(ServerSettings, namespace)
        log_to_stderr(server, name)
        uvloop.run(_awaited(serve(settings, server)))
    except GrokmoeError as error:
        complain(name, error.message)
        return 1
    return 0


async def _awaited(work: Awaitable[None]) -> None:
    await work
