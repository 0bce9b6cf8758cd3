"""Holds counts and relative times of hot paths against those in the repository.

    python -m benchmarks.check              exit code 1 when one is worse than its tolerance allows
    python -m benchmarks.check --update     writes what is found down as the new baseline

Counts repeat exactly, whatever else the machine does; times are multiples of a product of matrices that is timed in
turns with them. What each path is says benchmarks/check/paths.py. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.check import paths
from benchmarks.check.baseline import FAILURES, FILE, PYTHON, Baseline, Comparison, Figure, Unit, compare
from benchmarks.check.counting import calls_of, operations_of
from benchmarks.check.timing import ratios

Paths = dict[str, Callable[[], object]]


def hot_paths() -> tuple[Paths, Paths]:
    """By name: those where only Python works, and those where torch computes."""
    model = paths.Model()
    python: Paths = {
        "16 scheduler steps, 256 sequences": paths.Scheduling(paths.MANY).run_page,
        "writing a plan, 256 sequences": paths.writing_plans(),
        "a plan there and back, 256 sequences": paths.plan_there_and_back,
        "32 rows there and back": lambda: paths.rows_there_and_back(32, 1024),
    }
    torch_too: Paths = {
        "decode step, 8 sequences, 2 layers": model.step,
        "experts, 256 rows": model.experts_of_one_call,
        "gate to combine, 256 rows": model.rows_to_experts_and_back,
    }
    return python, torch_too


def measure(python: Paths, torch_too: Paths, rounds: int) -> list[Figure]:
    """All figures of all paths. rounds: of the times; 0: no times."""
    figures = [Figure(name, Unit.CALLS, calls_of(run)) for name, run in {**python, **torch_too}.items()]
    for name, run in torch_too.items():
        count, num_bytes = operations_of(run)
        figures += [Figure(name, Unit.OPERATIONS, count), Figure(name, Unit.BYTES, num_bytes)]
    for num_rows in (32, 1024):
        messages = len(paths.rows_messages(num_rows, 1024))
        figures.append(Figure(f"{num_rows} rows of 1024 in bfloat16", Unit.MESSAGES, messages))
    if rounds:
        figures += [Figure(name, Unit.RATIO, ratio) for name, ratio in ratios(torch_too, rounds).items()]
    return figures


def show(console: Console, comparisons: list[Comparison]) -> None:
    """One row per figure."""
    table = Table("", box=None, padding=(0, 2))
    for name in ("before", "now", "change"):
        table.add_column(name, justify="right")
    table.add_column("")
    for each in comparisons:
        change = f"{each.now / each.before - 1:+.1%}" if each.before and each.now is not None else ""
        table.add_row(each.key, _text(each.before), _text(each.now), change, each.verdict)
    console.print(table)


def _text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value == int(value) else f"{value:.2f}"


def main() -> int:
    """See the module's docstring. The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the baseline down anew")
    parser.add_argument("--baseline", type=Path, default=FILE, help="file of the baseline (default: the repository's)")
    parser.add_argument("--rounds", type=int, default=60, help="of the times (default: 60); 0: counts only")
    options = parser.parse_args()
    torch.manual_seed(0)
    figures = measure(*hot_paths(), options.rounds)
    baseline = Baseline.read(options.baseline)
    if not options.rounds:
        baseline = baseline.without(Unit.RATIO)
    comparisons = compare(baseline, figures)
    show(Console(width=120), comparisons)
    if baseline.python != PYTHON:
        print(f"the baseline is of Python {baseline.python}, this is {PYTHON}: function calls are compared loosely")
    rows = [dataclasses.asdict(each) for each in comparisons]
    print(json.dumps({"benchmark": "check", "python": PYTHON, "rows": rows}))
    if options.update:
        Baseline.of(figures).write(options.baseline)
        return 0
    return int(any(each.verdict in FAILURES for each in comparisons))


if __name__ == "__main__":
    sys.exit(main())
