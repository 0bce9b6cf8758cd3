"""The tables, for a terminal and for the page; the page's are between two marks, and made by nobody else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.predictions.cases import Outcome, Prediction
from benchmarks.predictions.measurements import Measured

BEGIN, END = "<!-- made by benchmarks/predictions: begin -->", "<!-- made by benchmarks/predictions: end -->"

SHOWN = ("small and middle", "two workers, one lane")
"""Cases whose every prediction is shown."""


def page(measured: Measured, split: Sequence[Outcome], fused: Sequence[Outcome]) -> str:
    """All of it, as Markdown."""
    conditions = [each.conditions for each in (*measured.steps, *measured.latencies)]
    dates = sorted({each.date for each in conditions})
    rates = [each.limits["bandwidth"][-1][1] / 1e9 for each in conditions]
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    header = ("fitted to", "steps fitted", "predicted", "median error", "p90", "largest")
    parts = [
        f"Measured {when} on {conditions[0].machine}. Memory was read at {min(rates):.0f} to {max(rates):.0f} GB/s, "
        f"and other programs used at most {max(each.foreign for each in conditions):.0%} of the machine.",
        _table(header, list(_summaries(split))),
        "The same of the fused process:",
        _table(header, list(_summaries(fused))),
    ]
    for outcome in split:
        if outcome.case.name in SHOWN:
            rows = [_row(each) for each in (*outcome.steps, *outcome.traffic)]
            title = f"Fitted to {outcome.case.name}:"
            parts += [title, _table(("model", "topology", "load", "measured, ms", "predicted", "error"), rows)]
    return "\n\n".join(parts)


def _summaries(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, ...]]:
    for outcome in outcomes:
        for part, what in (("steps", "steps"), ("traffic", "figures under traffic")):
            number, *errors = outcome.summary(part)
            if number:
                shown = [f"{error:.0%}" for error in errors]
                yield (outcome.case.name, str(outcome.num_fitted), f"{number} {what}", *shown)


def _row(each: Prediction) -> tuple[str, ...]:
    figures = (_number(value) for value in (each.measured, each.predicted))
    return each.model, each.topology, each.load, *figures, f"{each.error:+.0%}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def put(path: Path, text: str) -> None:
    """Between the marks of the page."""
    path.write_text(changed(path.read_text(), text))


def changed(old: str, text: str) -> str:
    """The page with the text between its marks."""
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert END in rest, f"the page has no marks {BEGIN} and {END}"
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"
