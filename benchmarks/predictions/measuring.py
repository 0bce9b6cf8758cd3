"""One topology, started, measured with each of its loads, and ended."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import limits as machine
from benchmarks.peers.machine import describe, foreign
from benchmarks.predictions.configurations import CACHED, MODELS, Topology, Traffic, loads_of, traffics_of
from benchmarks.predictions.measurements import Conditions, Latencies, Measured, Steps
from benchmarks.step.loads import Load, run
from benchmarks.step.loads import Measured as Run
from benchmarks.step.topologies import random_model, start

ROOT = Path(__file__).resolve().parents[2]

FIGURES = ("ttft", "tpot")
QUANTILES = ("median", "p90")


TRIES = 3


def measure(topology: Topology, cache: Path, rounds: int) -> Measured:
    """All loads of one topology, anew if other programs disturbed it, and be it in vain."""
    for _ in range(TRIES):
        measured = _once(topology, cache, rounds)
        conditions = [each.conditions for each in (*measured.steps, *measured.latencies)]
        if not conditions[0].is_disturbed:
            break
        print(f"others used {conditions[0].foreign:.0%} of the machine", file=sys.stderr, flush=True)
    return measured


def _once(topology: Topology, cache: Path, rounds: int) -> Measured:
    """A load's first run is for nobody."""
    model = random_model(cache / CACHED[topology.model], MODELS[topology.model])
    limits = dataclasses.asdict(asyncio.run(machine.measure(torch.bfloat16)))
    with foreign() as others:
        steps, latencies = asyncio.run(_measure(topology, model, rounds))
    cores, today = len(os.sched_getaffinity(0)), datetime.date.today().isoformat()
    conditions = Conditions(limits, cores, others.share, today, describe())
    return Measured(
        tuple(_medians(topology, load, runs[1:], conditions) for load, runs in steps.items()),
        tuple(Latencies(topology, traffic, figures, conditions) for traffic, figures in latencies.items()),
    )


async def _measure(
    topology: Topology, model: Path, rounds: int
) -> tuple[dict[Load, list[Run]], dict[Traffic, dict[str, float]]]:
    vocab_size = MODELS[topology.model].vocab_size
    settings = {"lanes": topology.lanes} if topology.lanes > 1 else {}
    runs: dict[Load, list[Run]] = {}
    async with start(model, "bfloat16", topology.expert_workers, **settings) as service:
        for seed in range(-1, rounds):
            for load in loads_of(topology):
                runs.setdefault(load, []).append(await run(service.client, load, vocab_size, seed))
        traffics = {each: await _load(service.address, each) for each in traffics_of(topology)}
    return runs, traffics


async def _load(address: str, traffic: Traffic) -> dict[str, float]:
    """By `grokmoe loadtest`, all requests counted."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "address": address,
            "request-rate": traffic.rate,
            "num-prompts": traffic.num_requests,
            "input-len": traffic.prompt,
            "output-len": traffic.output,
            "seed": traffic.seed,
            "window": "0,1",
            "max-lag-ms": 1e6,
            "metric-percentiles": "50,90",
            "output-dir": folder,
        }
        command = [
            "-m",
            "launcher",
            "loadtest",
            "--no-progress",
            *(f"--{name}={value}" for name, value in flags.items()),
        ]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=ROOT, stdout=pipe, stderr=pipe)
        _, said = await process.communicate()
        assert process.returncode == 0, said.decode()
        result = json.loads((Path(folder) / "result.json").read_text())
    assert result["completed"] == traffic.num_requests, result["errors_by_code"]
    names = [f"{quantile}_{name}_ms" for name in FIGURES for quantile in QUANTILES]
    return {name: result[name] for name in names}


def _medians(topology: Topology, load: Load, runs: list[Run], conditions: Conditions) -> Steps:
    seconds = [each.seconds for each in runs]
    legs = {leg: statistics.median(each.legs[leg] for each in runs) for leg in runs[0].legs}
    return Steps(topology, load, statistics.median(seconds), legs, max(seconds) / min(seconds), conditions)
