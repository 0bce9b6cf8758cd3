"""`grokmoe loadtest`: a run, a sweep, a run with faults, or a comparison, from settings to an exit code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from grokmoe import ClientOptions, ConfigError
from loadtest import output, tables
from loadtest.compare import change_table, compare, differences
from loadtest.fault import check_faults, effect, parse_fault, read_state
from loadtest.record import RequestRecord
from loadtest.result import assess, build, slo_of
from loadtest.session import Run, Session
from loadtest.settings import LoadSettings
from loadtest.sweep import Sweep, holds

OK, REGRESSION, INVALID = 0, 3, 4
"""Exit codes; 1 and 2 are those of an error and of a command line that cannot be."""

PROBE_CONCURRENCY, PROBE_REQUESTS = 16, 48
"""Of the closed loop that says where a sweep begins."""

FEWEST_PER_STEP = 20
"""Requests of a sweep's step, however slow its rate: a share of fewer says nothing."""


async def run_load(settings: LoadSettings, address: str, options: ClientOptions, console: Console) -> int:
    """Loads the server and writes the result's folder. Returns the exit code. Raises GrokmoeError.

    address: empty: the one in the settings' `state`.
    """
    state = None if settings.state is None else read_state(Path(settings.state))
    if settings.fault and state is None:
        raise ConfigError("fault needs state, which says whose process to signal")
    if state is not None:
        check_faults([parse_fault(text) for text in settings.fault], state)
        address = address or state.address
    slo_of(settings)  # a mistake is better told now
    directory = Path(settings.output_dir)
    output.prepare(directory)
    async with Session(settings, address, options, console, state) as session:
        await session.warm_up()
        if settings.sweep:
            result, records = await _sweep(session, address, console)
        else:
            result, records = await _single(session, address)
    output.write(directory, result, records)
    show(console, result, settings.percentile_metrics.split(","))
    console.print(f"written: {directory}/result.json, requests.jsonl, report.html, report.md", soft_wrap=True)
    return OK if result["valid"] else INVALID


async def _single(session: Session, address: str) -> tuple[dict[str, Any], Sequence[RequestRecord]]:
    """One run; with faults, one without them before it."""
    settings = session.settings
    faults = [parse_fault(text) for text in settings.fault]
    plan = await session.plan(settings.seed)
    calm = await session.run(plan, "undisturbed") if faults else None
    run = await session.run(plan, "with faults" if faults else "load", faults)
    result = build(settings, run, assess(settings, run.records), session.model, address)
    if calm is not None:
        result["faults"] = [
            {"fault": text, **effect(at, run.records, calm.records, slo_of(settings))}
            for text, at in zip(settings.fault, run.faults, strict=True)
        ]
        result["undisturbed"] = assess(settings, calm.records)
    return result, run.records


async def _sweep(session: Session, address: str, console: Console) -> tuple[dict[str, Any], Sequence[RequestRecord]]:
    """The search. The result is that of the highest rate that held, or of the last one if none did."""
    settings = session.settings
    start = settings.sweep_start
    if not start:
        start = await session.closed_loop_rate(PROBE_CONCURRENCY, PROBE_REQUESTS, settings.seed + 500_009) / 2
        console.print(f"a closed loop of {PROBE_CONCURRENCY} completes {2 * start:.3g} requests/s", style="dim")
    search = Sweep(start, settings.sweep_factor, settings.sweep_tolerance, settings.sweep_steps)
    steps: list[dict[str, Any]] = []
    best: tuple[float, Run, dict[str, Any]] | None = None
    while (rate := search.next_rate()) is not None:
        # Other prompts at each step: what is in the prefix cache must not help.
        seed = settings.seed + 1009 * (len(steps) + 1)
        num = max(FEWEST_PER_STEP, math.ceil(rate * settings.sweep_seconds))
        run = await session.run(await session.plan(seed, num, rate), f"{rate:.3g} requests/s")
        figures = assess(settings, run.records)
        does_hold = holds(figures)
        search.add(rate, does_hold)
        steps.append({"request_rate": rate, "holds": does_hold, **_step(figures)})
        console.print(_said(steps[-1]), style="dim")
        if best is None or (does_hold and rate >= search.held) or not search.held:
            best = rate, run, figures
    if best is None:
        raise ConfigError("the sweep has no step to make")
    rate, run, figures = best
    result = build(settings, run, figures, session.model, address, rate)
    failed = None if math.isinf(search.failed) else search.failed
    result["sweep"] = {"held": search.held, "failed": failed, "steps": steps}
    return result, run.records


def _step(figures: dict[str, Any]) -> dict[str, Any]:
    """What a step leaves in the result: its figures without intervals and without the whole run's."""
    left_out = ("confidence_intervals", "whole_run")
    return {name: value for name, value in figures.items() if name not in left_out}


def _said(step: dict[str, Any]) -> str:
    p99 = f", TTFT p99 {step['p99_ttft_ms']:.0f} ms" if "p99_ttft_ms" in step else ""
    return (
        f"{step['request_rate']:8.3g}/s {'holds' if step['holds'] else 'fails'}: {100 * step['slo_attained']:.1f} % "
        f"good, {step['request_throughput']:.2f}/s completed{p99}{'' if step['valid'] else ', INVALID'}"
    )


def run_compare(before: Path, after: Path, threshold: float, console: Console) -> int:
    """Shows the changes. Returns REGRESSION if one is worse with confidence, INVALID if a side is."""
    if threshold < 0:
        raise ConfigError(f"threshold is {threshold}, must be at least 0")
    a, b = output.read(before), output.read(after)
    for line in differences(a[0], b[0]):
        console.print(f"note: {line}", style="yellow", soft_wrap=True, markup=False)
    changes = compare(a, b)
    show_table(console, change_table(changes, threshold))
    if any(change.is_regression(threshold) for change in changes):
        return REGRESSION
    return OK if a[0]["valid"] and b[0]["valid"] else INVALID


def show(console: Console, result: dict[str, Any], names: Sequence[str]) -> None:
    """The result on a terminal."""
    shown = [
        tables.sweep_table(result),
        tables.overview(result),
        dataclasses.replace(tables.latency_table(_bare(result), names), title="latency"),
        tables.faults(result),
        tables.errors(result),
        tables.lag(result),
    ]
    for table in shown:
        if table.rows:
            show_table(console, table)
    for line in tables.verdict(result):
        style = "bold red" if line.startswith("INVALID") else "bold"
        console.print(line, style=style, markup=False, soft_wrap=True)


def _bare(result: dict[str, Any]) -> dict[str, Any]:
    """Without intervals, which a terminal has no room for."""
    return {**result, "confidence_intervals": {}}


def show_table(console: Console, table: tables.Table) -> None:
    """Numbers to the right."""
    drawn = RichTable(title=table.title, title_justify="left", box=None, title_style="bold", padding=(0, 2))
    for index, name in enumerate(table.header):
        drawn.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    console.print(drawn)
