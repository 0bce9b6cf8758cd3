"""grokmoe beside llama.cpp and vLLM, on the same cores, in the same minutes, with the same model.

    python -m benchmarks.peers --llama-bin DIR --vllm-python FILE --json race.json
    python -m benchmarks.peers --report race.json --markdown        the tables of an earlier race

Round by round every contender is started, measured and ended, so that they never share the cores and what drifts hits
all. A number is the median of the rounds and half of their spread; a ratio is the median of each round's. Nobody has
the prompts in a cache: all are random, none is used twice.

prefill N: one prompt of N tokens, by the time until its first output token; llama.cpp by its llama-bench, which times
the prompt alone. decode B: B sequences at once, 128 tokens in, 64 out, the time of the prompts and the first token
taken off; llama.cpp by its llama-batched-bench. N clients: streaming clients in closed loops, 128 in, 64 out: output
tokens/s, time to first token, gaps between pieces of a stream; llama.cpp by its llama-server. grokmoe is measured
through the service over gRPC with streaming clients in all of these, fused (`grokmoe serve`) and split (`grokmoe up`).

straight torch: the same forward with packed weights and nothing around it. its parts: the products and the attention in
that run alone, as if all else cost nothing.

A contender that is not installed is left out, with a word on how to install it. Close all else that computes: what
others used is said per turn. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.peers import machine
from benchmarks.peers.contender import Contender
from benchmarks.peers.goals import FUSED, INT8, LLAMA, LLAMA_Q8, VLLM, goals, judge, split
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.race import race
from benchmarks.peers.report import goal_lines, lines, markdown, table
from benchmarks.peers.results import Results, Sample
from benchmarks.peers.service import Service
from benchmarks.peers.vllm_peer import Vllm
from benchmarks.peers.workload import Workload
from benchmarks.peers.yardstick import Yardstick
from grokmoe.checkpoint_writer import random_checkpoint
from grokmoe.model_config import BENCH

PEERS = ("ours", "llama.cpp", "vllm", "prototype")


def numbers(text: str) -> tuple[int, ...]:
    """Of a flag: whole numbers, comma-separated; empty: none."""
    return tuple(int(part) for part in text.split(",") if part)


def parse() -> argparse.Namespace:
    """The command line."""
    default = Workload()
    parser = argparse.ArgumentParser(
        "python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default=",".join(PEERS), help="who takes part (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--model", type=Path, help="checkpoint directory (default: the bench model, made in --cache)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "grokmoe", help="for models made here")
    parser.add_argument("--llama-bin", type=Path, default=os.environ.get("LLAMA_BIN"), help="llama.cpp's programs")
    parser.add_argument("--vllm-python", type=Path, default=os.environ.get("VLLM_PYTHON"), help="that has vLLM")
    parser.add_argument("--vllm-eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--experts", type=numbers, default=(2, 4), help="expert workers of split rows (default: 2,4)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the others (default: all cores)")
    parser.add_argument("--prefills", type=numbers, default=default.prefills, help="prompt lengths (default: 512,2048)")
    parser.add_argument("--batches", type=numbers, default=default.batches, help="decoding (default: 1,8,32)")
    parser.add_argument("--clients", type=numbers, default=default.clients, help="streaming (default: 8,32)")
    parser.add_argument("--requests", type=int, default=default.requests, help="of each client (default: 2)")
    parser.add_argument("--new", type=int, default=default.new, help="tokens to generate (default: 64)")
    parser.add_argument("--repeats", type=int, default=default.repeats, help="of a load in a round (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to keep every value, after each turn")
    parser.add_argument("--report", type=Path, metavar="FILE", help="show a file of --json, measure nothing")
    parser.add_argument("--markdown", action="store_true", help="tables for a page")
    options = parser.parse_args()
    if unknown := set(options.peers.split(",")) - set(PEERS):
        parser.error(f"--peers: no {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    return options


def say(line: str) -> None:
    """Progress goes to standard error; the tables and the JSON to standard output."""
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)


def bench_model(cache: Path) -> Path:
    """The directory of the random bench model, made if it is not there."""
    directory = cache / "bench"
    if not (directory / "config.json").exists():
        say(f"making {directory}")
        random_checkpoint(directory, BENCH)
    return directory


def contenders(options: argparse.Namespace) -> list[Contender]:
    """In the order of their turns."""
    model = options.model or bench_model(options.cache)
    llama = {"model": model, "cache": options.cache, "bin": options.llama_bin, "threads": options.threads}
    found: dict[str, list[Contender]] = {
        "llama.cpp": [
            LlamaCpp(LLAMA, "bf16", **llama),
            LlamaCpp(LLAMA_Q8, "q8_0", **llama, is_served=False),
        ],
        "vllm": [Vllm(VLLM, model, options.vllm_python, options.threads, options.vllm_eager)],
        "prototype": [Yardstick(model, options.threads)],
        "ours": [
            Service(FUSED, model),
            Service(INT8, model, expert_dtype="int8"),
            *(Service(split(count), model, count) for count in options.experts),
        ],
    }
    return [each for name, several in found.items() if name in options.peers.split(",") for each in several]


async def stoppable(running: Coroutine[Any, Any, Results]) -> Results:
    """SIGTERM ends it as Ctrl-C does: contenders are ended too."""
    task = asyncio.ensure_future(running)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        sys.exit("stopped")


def outcome(results: Results, workload: Workload, about: str) -> dict[str, Any]:
    """All that is kept of a race."""
    return {
        "benchmark": "peers",
        "about": about,
        "workload": dataclasses.asdict(workload),
        "samples": [dataclasses.asdict(sample) for sample in results.samples],
    }


def show(kept: dict[str, Any], is_markdown: bool) -> None:
    """The tables."""
    results = Results(Sample(**sample) for sample in kept["samples"])
    sizes: dict[str, Any] = kept["workload"]
    workload = Workload(**{name: tuple(size) if isinstance(size, list) else size for name, size in sizes.items()})
    tables = (lines(results, workload.metrics()), goal_lines(judge(goal, results) for goal in goals()))
    foreign = max(results.foreign(), default=0.0)
    console = Console(width=220, highlight=False, soft_wrap=True)
    console.print(f"{kept['about']}; others used at most {foreign:.0%} of it during a turn")
    for each in tables:
        console.print()
        console.print(markdown(each) if is_markdown else table(each), markup=False)


def main() -> None:
    """See the module's docstring."""
    options = parse()
    if options.report:
        show(json.loads(options.report.read_text()), options.markdown)
        return
    workload = Workload(
        prefills=options.prefills,
        batches=options.batches,
        new=options.new,
        repeats=options.repeats,
        clients=options.clients,
        requests=options.requests,
    )
    about = f"{machine.describe()}, {datetime.date.today().isoformat()}, {options.rounds} rounds"

    def keep(results: Results) -> None:
        if options.json:
            options.json.write_text(json.dumps(outcome(results, workload, about), indent=1) + "\n")

    results = asyncio.run(stoppable(race(contenders(options), workload, options.rounds, say, keep)))
    kept = outcome(results, workload, about)
    show(kept, options.markdown)
    print(json.dumps(kept))


if __name__ == "__main__":
    main()
