"""The tables: one per load, a row per leg, for each topology the time of the leg and the least it could take."""

from __future__ import annotations

import dataclasses
import statistics

from rich.console import Console
from rich.table import Table

from benchmarks.step.loads import Load, Measured

WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Cell:
    """One load on one topology: medians over its runs. Seconds of one unit; floors by leg, where there are any."""

    load: Load
    topology: str
    seconds: float
    legs: dict[str, float]
    floors: dict[str, float]
    num_steps: float
    tokens_per_second: float

    @classmethod
    def of(cls, load: Load, topology: str, runs: list[Measured], floors: dict[str, float]) -> Cell:
        """Takes the runs together. What no leg accounts for is the leg "other"."""
        median = statistics.median
        legs = {leg: median(run.legs[leg] for run in runs) for leg in runs[0].legs}
        legs["other"] = median(run.seconds - sum(run.legs.values()) for run in runs)
        return cls(
            load,
            topology,
            median(run.seconds for run in runs),
            legs,
            floors,
            median(run.num_steps for run in runs),
            median(run.tokens_per_second for run in runs),
        )

    def as_json(self) -> dict[str, object]:
        """For the last line of the output: milliseconds."""
        legs = {leg: {"ms": seconds * 1e3} for leg, seconds in self.legs.items()}
        for leg, seconds in self.floors.items():
            legs[leg]["floor_ms"] = seconds * 1e3
        return {
            **dataclasses.asdict(self.load),
            "topology": self.topology,
            "unit": self.load.unit,
            "ms": self.seconds * 1e3,
            "floor_ms": sum(self.floors.values()) * 1e3,
            "tokens_per_second": self.tokens_per_second,
            "num_steps": self.num_steps,
            "legs": legs,
        }


def show(console: Console, cells: list[Cell], markdown: bool) -> None:
    """One table per load."""
    for load in dict.fromkeys(cell.load for cell in cells):
        columns = [cell for cell in cells if cell.load == load]
        title = f"{load.name}, milliseconds per {load.unit}"
        header = ["leg", *(text for cell in columns for text in (cell.topology, "floor"))]
        rows = [[leg, *(text for cell in columns for text in _leg(cell, leg))] for leg in columns[0].legs]
        rows.append(["whole", *(text for cell in columns for text in _pair(cell.seconds, sum(cell.floors.values())))])
        rows.append(["tokens/s", *(text for cell in columns for text in (f"{cell.tokens_per_second:.0f}", ""))])
        if markdown:
            print_markdown(title, header, rows)
        else:
            print_table(console, title, header, rows)


def print_table(console: Console, title: str, header: list[str], rows: list[list[str]]) -> None:
    """For a terminal; all columns but the first hold numbers."""
    table = Table(header[0], title=title, title_justify="left", box=None, padding=(0, 2))
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def print_markdown(title: str, header: list[str], rows: list[list[str]]) -> None:
    """For a page."""
    print(f"**{title}**\n")
    for row in (header, ["---"] + ["---:"] * (len(header) - 1), *rows):
        print(f"| {' | '.join(row)} |")
    print()


def _leg(cell: Cell, leg: str) -> tuple[str, str]:
    floor = cell.floors.get(leg)
    return f"{cell.legs[leg] * 1e3:.3f}", "" if floor is None else f"{floor * 1e3:.3f}"


def _pair(seconds: float, floor: float) -> tuple[str, str]:
    return f"{seconds * 1e3:.3f}", f"{floor * 1e3:.3f}"
