"""Where the time of a step goes, leg by leg, fused and split, and beside each leg the least it could take here.

    python -m benchmarks.step                          the embedded demo model
    python -m benchmarks.step --preset bench           0.89 B parameters, random; made once, kept in --cache

Every topology is measured through the service, by the SDK; the legs are what the router reports (router/legs.py). A
floor is the larger of the bytes that a leg must read at the measured bandwidth and its products at the measured rate;
of a wire, the same bytes there and back over a bare socket. Limits are measured anew before each topology. The last
line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import limits as machine
from benchmarks.step.floors import floors_of
from benchmarks.step.loads import Load, loads, run
from benchmarks.step.recording import recording_seconds
from benchmarks.step.report import WIDTH, Cell, show
from benchmarks.step.topologies import model_directory, start, topology_name
from grokmoe.model_config import ModelConfig
from grokmoe.tokenizer import Tokenizer
from router.config import LimitSettings
from router.text import TextSettings, TextStream


async def measure(
    model: Path, dtype: torch.dtype, worker_counts: list[int], wanted: list[Load], rounds: int
) -> tuple[list[Cell], dict[str, machine.Limits]]:
    """Topologies run one after the other: together they would share the cores. A load's first run is for nobody."""
    config = ModelConfig.from_file(model)
    cells, limits = [], {}
    for num_workers in worker_counts:
        name = topology_name(num_workers)
        print(f"measuring {name}", file=sys.stderr, flush=True)
        limits[name] = await machine.measure(dtype)
        async with start(model, str(dtype).removeprefix("torch."), num_workers) as service:
            runs = {load: [await run(service.client, load, config.vocab_size, -1)] for load in wanted}
            for seed in range(rounds):
                for load in wanted:
                    runs[load].append(await run(service.client, load, config.vocab_size, seed))
        for load, measured in runs.items():
            steps = load.steps(config, LimitSettings.max_step_tokens, dtype.itemsize, num_workers)
            cells.append(Cell.of(load, name, measured[1:], floors_of(steps, limits[name])))
    return cells, limits


def detokenise_seconds(model: Path) -> float | None:
    """Of one token; None for a model without a tokenizer. It is done beside the steps, and is part of "other"."""
    tokenizer = Tokenizer.from_directory(model)
    if tokenizer is None:
        return None
    stream, count = TextStream(tokenizer, TextSettings()), 2000
    begin = time.perf_counter()
    for number in range(count):
        stream.push((4 + number % (tokenizer.vocab_size - 4),))
    return (time.perf_counter() - begin) / count


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("demo", "bench"), default="demo", help="model (default: demo)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "grokmoe", help="where bench is kept")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--experts", default="2,4", help="numbers of expert workers beside fused (default: 2,4)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each load (default: 3)")
    parser.add_argument("--prefill", default="512,2048", help="lengths of prompts (default: 512,2048)")
    parser.add_argument("--decode", default="1,8,32", help="sequences that decode at once (default: 1,8,32)")
    parser.add_argument("--prompt", type=int, default=128, help="their prompts' length (default: 128)")
    parser.add_argument("--new", type=int, default=64, help="tokens that each gets (default: 64)")
    parser.add_argument("--markdown", action="store_true", help="tables for a page")
    options = parser.parse_args()
    model = model_directory(options.preset, options.cache)
    config = ModelConfig.from_file(model)
    wanted = loads(_numbers(options.decode), _numbers(options.prefill), options.prompt, options.new)
    for load in [load for load in wanted if not load.fits(config)]:
        print(f"{load.name}: longer than the model's context, left out")
        wanted.remove(load)
    counts = [0, *_numbers(options.experts)]
    cells, limits = asyncio.run(measure(model, getattr(torch, options.dtype), counts, wanted, options.rounds))
    show(Console(width=WIDTH), cells, options.markdown)
    recording, shortest = recording_seconds(config), min(cell.seconds for cell in cells)
    detokenise = detokenise_seconds(model)
    print(f"recording the legs: {recording * 1e6:.0f} us a step, {recording / shortest:.2%} of the shortest")
    if detokenise is not None:
        print(f'detokenising, part of "other": {detokenise * 1e6:.1f} us a token')
    result = {
        "benchmark": "step",
        "preset": options.preset,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "recording_us": recording * 1e6,
        "detokenise_us": None if detokenise is None else detokenise * 1e6,
        "limits": {name: dataclasses.asdict(each) for name, each in limits.items()},
        "rows": [cell.as_json() for cell in cells],
    }
    print(json.dumps(result))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


if __name__ == "__main__":
    main()
