"""The load test beside AIPerf, at the same time, on one server.

    python -m benchmarks.crosscheck --aiperf PATH        the program `aiperf` of an environment of its own

Both send requests of the same kind at the same rate, and count a latency from the send. AIPerf speaks HTTP, so it goes
through the gateway of `grokmoe serve --openai`; `grokmoe loadtest` speaks gRPC and goes past it. Meanwhile single
requests go through it and past it in turn: what it adds is the difference of those. If both tools are right, nothing is
left between them but that. Server and tools have cores of their own. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.crosscheck import tools
from benchmarks.crosscheck.figures import LATENCIES, Comparison, Latencies, compare
from benchmarks.crosscheck.hop import probe
from benchmarks.crosscheck.server import server, shares
from benchmarks.peers.machine import describe, foreign
from grokmoe import Client

START = 180.0
"""Seconds that AIPerf has to begin."""

PAGE_BEGIN, PAGE_END = "<!-- made by benchmarks/crosscheck: begin -->", "<!-- made by benchmarks/crosscheck: end -->"


def run(options: argparse.Namespace, load: tools.Load) -> dict[str, Latencies]:
    """One run of both, and of the probe: their latencies by name."""
    for_server, for_tools = shares()
    os.sched_setaffinity(0, for_tools)
    with server(for_server) as (address, url), tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as threads:
        folder = Path(name)
        with Client(address) as client:
            theirs = tools.Aiperf(options.aiperf, url, load, folder, for_tools, seed=1)
            _wait_for_work(client)
        ours = threads.submit(tools.ours, address, load, folder, for_tools, 2)
        around, through = probe(address, url, load, 3, ours.done)
        mine, begin, end = ours.result()
        return {"ours": mine, "theirs": theirs.wait(begin, end), "around": around, "through": through}


def _wait_for_work(client: Client) -> None:
    """Until the other tool has sent its first requests."""
    deadline, steps = time.monotonic() + START, client.status().steps
    while client.status().steps < steps + 50:
        if time.monotonic() > deadline:
            raise SystemExit("AIPerf does not begin")
        time.sleep(0.2)


def rows(found: list[Comparison]) -> list[tuple[str, ...]]:
    """As tables have them."""
    return [
        (
            each.name,
            f"{each.ours:.2f}",
            f"{each.theirs:.2f}",
            f"{each.hop:+.2f}",
            f"{each.left:+.2f}",
            f"{each.interval.low:+.2f} to {each.interval.high:+.2f}",
            "yes" if each.agrees else "no",
        )
        for each in found
    ]


HEADER = ("ms", "loadtest", "AIPerf", "gateway adds", "left", "95 %", "agree")


def markdown(found: list[Comparison], numbers: dict[str, int], load: tools.Load, share: float) -> str:
    """For the page."""
    lines = [HEADER, ["---"] * len(HEADER), *rows(found)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    counts = ", ".join(f"{count} {name}" for name, count in numbers.items())
    return (
        f"{describe()}; other programs used {share:.0%} of it. Each tool sent {load.rate:g} requests/s for "
        f"{load.seconds:g} s, prompts of {load.words} words, answers of {load.output_len} tokens; requests compared: "
        f"{counts}.\n\n{table}"
    )


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aiperf", default="aiperf", help="the program (default: the one on the path)")
    parser.add_argument("--rate", type=float, default=2.0, help="requests/s of each tool (default: 2)")
    parser.add_argument("--seconds", type=float, default=75.0, help="that both send (default: 75)")
    parser.add_argument("--words", type=int, default=24, help="of a prompt (default: 24)")
    parser.add_argument("--output-len", type=int, default=32, help="tokens of each answer (default: 32)")
    parser.add_argument("--page", type=Path, help="docs/loadtest.md: put the table there")
    options = parser.parse_args()
    load = tools.Load(options.rate, options.seconds, options.words, options.output_len)
    with foreign() as others:
        latencies = run(options, load)
    found = compare(latencies["ours"], latencies["theirs"], latencies["around"], latencies["through"])
    names = {"ours": "loadtest", "theirs": "AIPerf", "around": "past the gateway", "through": "through it"}
    numbers = {names[side]: len(each[LATENCIES[0]]) for side, each in latencies.items()}
    table = Table(*HEADER, box=None, padding=(0, 2))
    for row in rows(found):
        table.add_row(*row)
    Console(width=110).print(table)
    if options.page:
        before, _, rest = options.page.read_text().partition(PAGE_BEGIN)
        _, _, after = rest.partition(PAGE_END)
        text = markdown(found, numbers, load, others.share)
        options.page.write_text(f"{before}{PAGE_BEGIN}\n\n{text}\n\n{PAGE_END}{after}")
    told = [dataclasses.asdict(each) for each in found]
    print(json.dumps({"benchmark": "crosscheck", "requests": numbers, "foreign": others.share, "figures": told}))


if __name__ == "__main__":
    main()
