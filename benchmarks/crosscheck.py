"""The load test against AIPerf, in turns, on one server: the same prompts, lengths and rate.

    python -m benchmarks.crosscheck --aiperf PATH        the program `aiperf` of an environment of its own

AIPerf speaks HTTP, so it goes through the gateway of `grokmoe serve --openai`; `grokmoe loadtest` speaks gRPC and does
not. What the gateway adds is measured beside: single requests, one through it and one around it in turn, while nothing
else is asked. If both tools are right, they differ by that. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grokmoe import Client
from launcher.paths import DEMO_MODEL

ROOT = Path(__file__).resolve().parents[1]

START_TIMEOUT = 300.0
"""Seconds from the start of the server to both of its addresses."""

KEYS = {
    "TTFT p50": ("median_ttft_sent_ms", "time_to_first_token", "p50"),
    "TTFT p90": ("p90_ttft_sent_ms", "time_to_first_token", "p90"),
    "TPOT p50": ("median_tpot_ms", "inter_token_latency", "p50"),
    "TPOT p90": ("p90_tpot_ms", "inter_token_latency", "p90"),
    "end to end p50": ("median_e2el_sent_ms", "request_latency", "p50"),
    "requests/s": ("request_throughput", "request_throughput", "avg"),
    "output tokens/s": ("output_throughput", "output_token_throughput", "avg"),
}
"""Figure -> its name in our result, in AIPerf's, and the statistic of it. Latencies in ms, from the actual send."""

WORDS = ("love", "death", "king", "night", "crown", "sword", "heart", "sea", "storm", "ghost", "rose", "blood", "grave")


@contextlib.contextmanager
def server() -> Iterator[tuple[str, str]]:
    """`grokmoe serve --openai` on free ports. Yields its gRPC address and the URL of its OpenAI API."""
    command = [sys.executable, "-m", "launcher", "serve", "--openai", "--port", "0", "--openai-port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        found: dict[str, str] = {}
        deadline = time.monotonic() + START_TIMEOUT
        for line in process.stdout:
            word, _, value = line.strip().partition(" ")
            found[word] = value
            if {"READY", "OPENAI"} <= found.keys() or time.monotonic() > deadline:
                break
        yield found["READY"], found["OPENAI"]
    finally:
        process.terminate()
        process.wait()


def prompts(num: int, words: int, seed: int) -> list[str]:
    """Texts that begin differently, so that no prefix is shared."""
    draw = random.Random(seed)
    return [f"{index} {' '.join(draw.choices(WORDS, k=words))}" for index in range(num)]


def ours(address: str, texts: list[str], options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """`grokmoe loadtest` on these prompts."""
    file = folder / "custom.jsonl"
    file.write_text("".join(json.dumps({"prompt": t, "output_tokens": options.output_len}) + "\n" for t in texts))
    flags = {
        "address": address,
        "dataset-name": "custom",
        "dataset-path": file,
        "request-rate": options.rate,
        "arrivals": "constant",
        "num-prompts": len(texts),
        "num-warmups": 0,
        "window": "0,1",
        "metric-percentiles": "50,90",
        "output-dir": folder / "ours",
        "max-lag-ms": 1e6,
    }
    given = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, "-m", "launcher", "loadtest", *given, "--ignore-eos=true", "--no-progress"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "ours" / "result.json").read_text())
    assert result["completed"] == len(texts), result["errors_by_code"]
    return {name: result[key] for name, (key, _, _) in KEYS.items()}


def theirs(url: str, texts: list[str], options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """AIPerf on the same."""
    file = folder / "single_turn.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    artifacts = folder / "aiperf"
    flags = {
        "model": DEMO_MODEL.name,
        "tokenizer": DEMO_MODEL,
        "endpoint-type": "completions",
        "url": url.removesuffix("/v1"),
        "input-file": file,
        "custom-dataset-type": "single_turn",
        "dataset-sampling-strategy": "sequential",
        "request-rate": options.rate,
        "arrival-pattern": "constant",
        "request-count": len(texts),
        "output-artifact-dir": artifacts,
        "ui": "none",
    }
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    extra = [f"max_tokens:{options.output_len}", "ignore_eos:true", "temperature:0"]
    command = [options.aiperf, "profile", "--streaming", *given]
    for pair in extra:
        command += ["--extra-inputs", pair]
    # Its packages are its own.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    exports = sorted(artifacts.rglob("profile_export_aiperf.json"))
    assert exports, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(exports[-1].read_text())
    assert result["request_count"]["avg"] == len(texts), result["request_count"]
    return {name: result[key][statistic] for name, (_, key, statistic) in KEYS.items()}


def gateway_adds(address: str, url: str, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds that the gateway adds, medians of single requests in turn: TTFT, TPOT, end to end."""
    target = urllib.parse.urlsplit(url)
    around, through = [], []
    with Client(address) as client:
        for text in prompts(options.probes, options.words, 99):
            begin = time.perf_counter()
            stream = client.stream(text, max_tokens=options.output_len, temperature=0, ignore_eos=True)
            around.append(_latencies(begin, [time.perf_counter() for delta in stream if delta.token_ids]))
            begin = time.perf_counter()
            through.append(_latencies(begin, list(_http_stamps(target, text, options.output_len))))
    medians = [[statistics.median(column) for column in zip(*rows, strict=True)] for rows in (around, through)]
    added = [there - here for here, there in zip(*medians, strict=True)]
    return {"TTFT p50": added[0], "TPOT p50": added[1], "end to end p50": added[2]}


def _latencies(begin: float, stamps: list[float]) -> tuple[float, float, float]:
    gaps = (stamps[-1] - stamps[0]) / max(1, len(stamps) - 1)
    return (stamps[0] - begin) * 1e3, gaps * 1e3, (stamps[-1] - begin) * 1e3


def _http_stamps(target: urllib.parse.SplitResult, text: str, num: int) -> Iterator[float]:
    """When each event with a text came."""
    connection = http.client.HTTPConnection(target.hostname or "", target.port)
    body = {"model": DEMO_MODEL.name, "prompt": text, "max_tokens": num, "temperature": 0, "stream": True}
    body["ignore_eos"] = True
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            yield time.perf_counter()
    connection.close()


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aiperf", default="aiperf", help="the program (default: the one on the path)")
    parser.add_argument("--rate", type=float, default=4.0, help="requests/s (default: 4)")
    parser.add_argument("--requests", type=int, default=120, help="of each run (default: 120)")
    parser.add_argument("--words", type=int, default=24, help="of a prompt (default: 24)")
    parser.add_argument("--output-len", type=int, default=32, help="tokens of each answer (default: 32)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tool, in turn (default: 3)")
    parser.add_argument("--probes", type=int, default=40, help="single requests each way (default: 40)")
    options = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "aiperf": []}
    with server() as (address, url), tempfile.TemporaryDirectory() as name:
        added = gateway_adds(address, url, options)
        for number in range(options.rounds):
            for tool, seed in (("ours", 2 * number), ("aiperf", 2 * number + 1)):
                texts = prompts(options.requests, options.words, seed)
                folder = Path(name) / f"{tool}-{number}"
                folder.mkdir()
                if tool == "ours":
                    rounds[tool].append(ours(address, texts, options, folder))
                else:
                    rounds[tool].append(theirs(url, texts, options, folder))
    show(Console(width=100), rounds, added)
    print(json.dumps({"rounds": rounds, "gateway": added, "load_average": os.getloadavg()[0]}))


def show(console: Console, rounds: dict[str, list[dict[str, float]]], added: dict[str, float]) -> None:
    """A row per figure: medians of the rounds, and their range."""
    table = Table("", "ours", "aiperf", "gateway adds", "left", box=None, padding=(0, 2))
    for name in KEYS:
        columns = [[each[name] for each in rounds[tool]] for tool in ("ours", "aiperf")]
        medians = [statistics.median(column) for column in columns]
        shown = [f"{statistics.median(c):.4g} ({min(c):.4g} - {max(c):.4g})" for c in columns]
        hop = added.get(name)
        left = medians[1] - medians[0] - (hop or 0.0)
        table.add_row(name, *shown, "" if hop is None else f"{hop:.3g}", f"{left:+.3g}")
    console.print(table)


if __name__ == "__main__":
    main()
