"""The tables: one per curve, with the line through it and whether the points lie on it."""

from __future__ import annotations

import dataclasses

from rich.console import Console

from benchmarks.scaling.axes import Curve
from benchmarks.scaling.line import Line, fit
from benchmarks.step.report import print_markdown, print_table


def show(console: Console, curves: list[Curve], markdown: bool) -> None:
    """One table per curve, and a sentence below it."""
    for curve in curves:
        line = fit(curve.points)
        header = [curve.x, f"{curve.unit}, measured", "the line"]
        rows = [[f"{x:g}", f"{y:.3f}", f"{line.at(x):.3f}" if line else ""] for x, y in curve.points]
        if markdown:
            print_markdown(curve.name, header, rows)
        else:
            print_table(console, curve.name, header, rows)
        print(f"{sentence(curve, line)}\n")


def sentence(curve: Curve, line: Line | None) -> str:
    """What the line is and how well it fits."""
    if line is None:
        return "too few points for a line"
    verdict = "straight" if line.is_straight else "NOT STRAIGHT"
    return (
        f"{verdict}: {line.intercept:.4g} {curve.unit} + {line.slope:.4g} per {curve.x}; R2 {line.r2:.3f}; "
        f"at most {line.worst:.0%} beside the line, at {line.worst_x:g}"
    )


def as_json(curve: Curve) -> dict[str, object]:
    """For the last line of the output."""
    line = fit(curve.points)
    found = None if line is None else {**dataclasses.asdict(line), "is_straight": line.is_straight}
    return {**dataclasses.asdict(curve), "line": found}
