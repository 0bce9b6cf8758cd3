"""The view of `grokmoe top`: tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from grokmoe import ModelInfo, Status, Worker, WorkerRole, WorkerState
from grokmoe.expert_units import describe_unit, unit_of
from launcher.experts import describe_ranges

if TYPE_CHECKING:
    from launcher.top import Rates

BAR_WIDTH = 16

HEAT_WIDTH = 64
"""Most cells of an expert's heat map: Grok-1's layers. Of a deeper model neighbours share one."""

STYLES = {
    WorkerState.READY: "green",
    WorkerState.JOINING: "yellow",
    WorkerState.SUSPECT: "yellow",
    WorkerState.DRAINING: "yellow",
    WorkerState.DEAD: "bold red",
}

HEAT_SIGNS = "·░▒▓█"
"""The same without colours."""

SHADES = tuple(range(235, 256, 4))
"""Colours of 256, dark to light: little load to much."""


def draw(model: ModelInfo, status: Status, rates: Rates) -> Group:
    """The whole view."""
    parts = [_head(model, status, rates), _workers(status)]
    if status.placement:
        parts.append(_experts(status, rates))
    if rates.leg_seconds:
        parts.append(_legs(rates))
    return Group(*parts)


def _head(model: ModelInfo, status: Status, rates: Rates) -> Text:
    pages = sum(worker.num_pages for worker in status.workers)
    used = sum(worker.used_pages for worker in status.workers)
    words = [
        f"{rates.tokens:.1f} tokens/s computed",
        f"{rates.steps:.1f} steps/s",
        f"{status.running} running",
        f"{status.waiting} waiting",
        f"KV pages {used / pages:.0%}" if pages else "no KV pages",
        f"imbalance {status.imbalance:.2f}" if status.imbalance else "imbalance unknown",
        f"{status.preemptions} preemptions",
    ]
    return Text.assemble((model.name, "bold"), "  ", ", ".join(words))


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for head in heads:
        is_number = head.endswith("/s") or head in ("", "pages", "ms per step")
        table.add_column(head, justify="right" if is_number else "left", no_wrap=head != "holds")
    return table


def _workers(status: Status) -> Table:
    table = _table("worker", "", "state", "pages", "rows/s", "holds", "address")
    for worker in status.workers:
        is_expert = worker.role is WorkerRole.EXPERT
        table.add_row(
            worker.role.value,
            str(worker.index),
            Text(worker.state.value, STYLES.get(worker.state, "")),
            "" if is_expert else f"{worker.used_pages}/{worker.num_pages}",
            f"{worker.rows_per_second:.0f}" if is_expert else "",
            Text(_holds(worker)),
            Text(" ".join(stage.address for stage in worker.stages) or worker.address),
        )
    return table


def _holds(worker: Worker) -> str:
    """Experts, or the layers of a pipeline's stages in the order of their addresses."""
    if worker.stages:
        return "layers " + " ".join(f"{stage.layer_begin}-{stage.layer_end - 1}" for stage in worker.stages)
    held = describe_ranges(worker.held) or ",".join(map(str, worker.experts))
    loading = describe_ranges(worker.loading)
    return f"{held} loads {loading}" if loading else held


def _experts(status: Status, rates: Rates) -> Table:
    most = max(rates.rows_E.values(), default=0.0)
    hottest = max((rate for strip in rates.rows_EL.values() for rate in strip), default=0.0)
    heads = ["expert", "rows/s", "", "workers"]
    table = _table(*heads, *(["layer by layer"] if hottest else []))
    table.columns[2].justify = "left"
    for each in status.placement:
        rate = rates.rows_E.get(each.expert, 0.0)
        shade = SHADES[round(rate / most * (len(SHADES) - 1))] if most else SHADES[0]
        workers = Text(",".join(map(str, each.workers))) if each.workers else Text("nobody", "bold red")
        heat = [_heat(rates.rows_EL.get(each.expert, ()), hottest)] if hottest else []
        unit = describe_unit(unit_of(each.expert, each.slice, each.num_slices))
        table.add_row(unit, f"{rate:.0f}", Text(_bar(rate, most), f"color({shade})"), workers, *heat)
    return table


def _heat(rates: Sequence[float], hottest: float) -> Text:
    """A cell per layer, light for many rows; the busiest of neighbours where there are more layers than cells."""
    size = -(-len(rates) // HEAT_WIDTH)
    strip = Text()
    for begin in range(0, len(rates), max(size, 1)):
        share = max(rates[begin : begin + size]) / hottest
        level = round(max(share, 0.0) * (len(SHADES) - 1))
        strip.append(HEAT_SIGNS[round(level / (len(SHADES) - 1) * (len(HEAT_SIGNS) - 1))], f"color({SHADES[level]})")
    return strip


def _legs(rates: Rates) -> Table:
    table = _table("leg", "ms per step", "")
    table.columns[2].justify = "left"
    longest = max(rates.leg_seconds.values())
    for leg, seconds in rates.leg_seconds.items():
        if seconds > 0:
            table.add_row(leg, f"{seconds * 1e3:.2f}", Text(_bar(seconds, longest), "cyan"))
    return table


def _bar(value: float, most: float) -> str:
    return "█" * round(value / most * BAR_WIDTH) if most > 0 else ""
