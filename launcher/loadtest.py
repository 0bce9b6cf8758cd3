"""`grokmoe loadtest`: the command line of the load test."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from grokmoe.errors import ConfigError
from grokmoe.settings import add_flags, from_namespace, setting
from launcher.connection import ConnectionSettings
from launcher.paths import DEFAULT_ADDRESS
from loadtest.command import run_compare, run_load
from loadtest.compare import THRESHOLD
from loadtest.explain import explain
from loadtest.settings import LIST_FLAGS, LoadSettings

DESCRIPTION = """\
Loads a server and says how it did. Writes result.json (the names of vLLM's benchmark), requests.jsonl, report.html and
report.md. `grokmoe loadtest compare A B` holds one folder against another.

exit codes: 0; 1 an error; 3 compare has found a regression; 4 the run is invalid"""

EPILOG = """\
examples:
  grokmoe loadtest --address 127.0.0.1:50051 --request-rate 8 --num-prompts 400 --input-len 128 --output-len 64
  grokmoe loadtest --max-concurrency 32 --num-prompts 500 --input-len uniform:32:256 --output-len 64
  grokmoe loadtest --sweep --input-len 128 --output-len 32 --goodput ttft:500 tpot:50
  grokmoe loadtest --state state.json --request-rate 8 --num-prompts 200 --fault kill:expert:1@10s
  grokmoe loadtest --demo --sweep --input-len 64 --output-len 16
  grokmoe loadtest compare before after"""


@dataclasses.dataclass(frozen=True)
class LoadtestSettings(LoadSettings, ConnectionSettings):
    """What `grokmoe loadtest` takes."""

    demo: bool = setting(False, "load a cluster with the demo model that is there for the time of the test")
    address: str = setting("", f"where the service is; default: the one in --state, else {DEFAULT_ADDRESS}")


def loadtest(argv: Sequence[str]) -> int:
    """Parses the command line and runs it. Returns the exit code. Raises GrokmoeError."""
    if argv[:1] == ["compare"]:
        return _compare(argv[1:])
    parser = argparse.ArgumentParser(
        "grokmoe loadtest",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--explain", action="store_true", help="say what every figure means, and end")
    add_flags(parser, LoadtestSettings)
    for action in parser._actions:
        if action.dest in LIST_FLAGS:  # as vLLM's: several arguments; commas do too
            action.nargs = "+"
    namespace = parser.parse_args(argv)
    if namespace.explain:
        print(explain())
        return 0
    for name in LIST_FLAGS:
        given = getattr(namespace, name)
        setattr(namespace, name, tuple(part for each in given for part in ((each,) if isinstance(each, str) else each)))
    settings = from_namespace(LoadtestSettings, namespace)
    return asyncio.run((_run_demo if settings.demo else _run)(settings))


async def _run(settings: LoadtestSettings) -> int:
    address = settings.address or ("" if settings.state else DEFAULT_ADDRESS)
    return await run_load(settings, address, settings.client_options(), _console(stderr=True))


async def _run_demo(settings: LoadtestSettings) -> int:
    """Starts the cluster and loads it."""
    from launcher.up import Cluster, UpSettings

    if settings.address or settings.state:
        raise ConfigError("demo starts a cluster of its own: neither address nor state goes with it")
    with tempfile.TemporaryDirectory() as directory:
        state = str(Path(directory) / "state.json")
        up = UpSettings(port=0, state=state, expert_replicas=2, kv_gib=0.25, log_level="warning")
        async with Cluster(up, lambda line: print(line, file=sys.stderr, flush=True)):
            return await _run(dataclasses.replace(settings, state=state))


def _compare(argv: Sequence[str]) -> int:
    description = "What changed from A to B, with confidence; ends with 3 if it got worse."
    parser = argparse.ArgumentParser("grokmoe loadtest compare", description=description)
    parser.add_argument("before", type=Path, metavar="A", help="folder of a result")
    parser.add_argument("after", type=Path, metavar="B", help="folder of another")
    text = f"smallest change that counts (default: {THRESHOLD})"
    parser.add_argument("--threshold", type=float, default=THRESHOLD, metavar="SHARE", help=text)
    namespace = parser.parse_args(argv)
    return run_compare(namespace.before, namespace.after, namespace.threshold, _console())


def _console(stderr: bool = False) -> Console:
    """Tables need their width, also where nobody says how wide the paper is."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=140)
