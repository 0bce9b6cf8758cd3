"""Both tools: started, waited for, and read."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.crosscheck.figures import Latencies, of_aiperf, of_ours
from benchmarks.crosscheck.server import ROOT, on
from launcher.paths import DEMO_MODEL
from loadtest import output

WORDS = ("love", "death", "king", "night", "crown", "sword", "heart", "sea", "storm", "ghost", "rose", "blood", "grave")

MARGIN = 45.0
"""Seconds of AIPerf's load beyond that of the load test, which runs within it: it starts later, and waits for a moment
in which the server has nothing to do."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What each tool sends: requests/s, Poisson: at even gaps the one's requests would always come at the same moment
    of the other's. seconds of it; words of a prompt; tokens of an answer."""

    rate: float
    seconds: float
    words: int
    output_len: int


def prompts(num: int, words: int, seed: int) -> list[str]:
    """Texts that begin differently, so that no prefix is shared."""
    draw = random.Random(seed)
    return [f"{seed}-{index} {' '.join(draw.choices(WORDS, k=words))}" for index in range(num)]


class Aiperf:
    """AIPerf under way: it sends until `wait`."""

    def __init__(self, program: str, url: str, load: Load, folder: Path, cores: set[int], seed: int) -> None:
        self._artifacts = folder / "aiperf"
        texts = prompts(round(load.rate * (load.seconds + MARGIN)), load.words, seed)
        file = folder / "single_turn.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        flags = {
            "model": DEMO_MODEL.name,
            "tokenizer": DEMO_MODEL,
            "endpoint-type": "completions",
            "url": url.removesuffix("/v1"),
            "input-file": file,
            "custom-dataset-type": "single_turn",
            "dataset-sampling-strategy": "sequential",
            "request-rate": load.rate,
            "arrival-pattern": "poisson",
            "request-count": len(texts),
            "output-artifact-dir": self._artifacts,
            "ui": "none",
        }
        command = [program, "profile", "--streaming", "--use-server-token-count"]
        command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        for pair in (f"max_tokens:{load.output_len}", "ignore_eos:true", "temperature:0"):
            command += ["--extra-inputs", pair]
        # Its packages are its own.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._said = (folder / "aiperf.log").open("w+")
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=self._said, stderr=self._said, preexec_fn=on(cores)
        )

    def wait(self, begin: float, end: float) -> Latencies:
        """Of the requests that it sent between two times, seconds of the epoch."""
        self._process.wait()
        exports = sorted(self._artifacts.rglob("profile_export.jsonl"))
        assert exports, Path(self._said.name).read_text()[-3000:]
        self._said.close()
        records: list[dict[str, Any]] = [json.loads(line) for line in exports[-1].read_text().splitlines()]
        return of_aiperf(records, begin, end)


def ours(address: str, load: Load, folder: Path, cores: set[int], seed: int) -> tuple[Latencies, float, float]:
    """`grokmoe loadtest`: its latencies, and when it began and ended, seconds of the epoch."""
    file = folder / "custom.jsonl"
    texts = prompts(round(load.rate * load.seconds), load.words, seed)
    file.write_text("".join(json.dumps({"prompt": t, "output_tokens": load.output_len}) + "\n" for t in texts))
    flags = {
        "address": address,
        "dataset-name": "custom",
        "dataset-path": file,
        "request-rate": load.rate,
        "seed": seed,
        "num-prompts": len(texts),
        "num-warmups": 0,
        "window": "0,1",
        "output-dir": folder / "ours",
        "max-lag-ms": 1e6,
    }
    given = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, "-m", "launcher", "loadtest", *given, "--ignore-eos", "--no-progress"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, preexec_fn=on(cores))
    end = time.time()
    assert done.returncode == 0, done.stderr
    result, records = output.read(folder / "ours")
    assert result["completed"] == len(texts), result["errors_by_code"]
    return of_ours(records), end - result["whole_run"]["duration"], end
