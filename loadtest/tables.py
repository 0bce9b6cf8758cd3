"""What the reports say in words and numbers; `loadtest/report.py` and the terminal only lay it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

NAMES = {
    "ttft": "TTFT",
    "ttft_sent": "TTFT from actual send",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2el": "end to end",
    "e2el_sent": "end to end from actual send",
    "ntpot": "normalised (NTPOT)",
    "server_queue": "queue at the server",
    "client_queue_time": "queue at the client",
    "cancel": "left after",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """The first column is text, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def verdict(result: dict[str, Any]) -> list[str]:
    """What one reads first, a sentence each."""
    lines = []
    if not result["valid"]:
        lines.append(f"INVALID: {result['invalid_because']}")
    if found := result.get("sweep"):
        if found["held"]:
            above = f"and fail at {found['failed']:.3g}" if found["failed"] is not None else "and no rate failed"
            lines.append(f"The objectives hold up to {found['held']:.3g} requests/s, {above}.")
        else:
            lines.append("The objectives hold at no rate that was tried.")
        late = [step["request_rate"] for step in found["steps"] if not step["valid"]]
        if late:
            rates = ", ".join(f"{rate:.3g}" for rate in late)
            lines.append(f"INVALID at {rates} requests/s: where the edge is may be the harness's doing.")
    for each in result.get("faults", ()):
        lines.append(
            f"{each['fault']}: {each['requests_lost']} of {each['requests_under_way']} requests under way were lost, "
            f"{each['changed']} of {each['compared']} got other tokens, the longest stall was "
            f"{milliseconds(each['longest_stall_ms'])} ms."
        )
    limits = ", ".join(f"{name.upper()} {limit:g} ms" for name, limit in result["slo"]["limits_ms"].items())
    holds = "hold" if result["slo_holds"] else "do not hold"
    lines.append(
        f"Objectives ({limits or 'completion'}, for {100 * result['slo']['share']:g} % of the requests) {holds}: "
        f"{100 * result['slo_attained']:.1f} % are good."
    )
    return lines


def overview(result: dict[str, Any]) -> Table:
    """Counts and throughputs of the window and of the whole run."""
    rows: list[tuple[str, str, Any]] = [
        ("seconds", "duration", ".2f"),
        ("requests scheduled", "scheduled", "d"),
        ("completed", "completed", "d"),
        ("failed", "failed", "d"),
        ("cancelled on purpose", "cancelled", "d"),
        ("incomplete", "incomplete", "d"),
        ("requests/s", "request_throughput", ".2f"),
        ("good requests/s", "request_goodput", ".2f"),
        ("output tokens/s", "output_throughput", ".1f"),
        ("total tokens/s", "total_token_throughput", ".1f"),
        ("peak output tokens/s", "max_output_tokens_per_s", ".0f"),
        ("peak requests under way", "max_concurrent_requests", "d"),
    ]
    whole = result["whole_run"]
    return Table(
        "load",
        ("", "window", "whole run"),
        tuple((label, format(result[name], how), format(whole[name], how)) for label, name, how in rows),
    )


def latency_table(result: dict[str, Any], names: Sequence[str] = tuple(NAMES)) -> Table:
    """Milliseconds, with the 95 % interval where there is one."""
    shares = [key for key in _percentile_keys(result) if key != "p50"]
    header = ("ms", "mean", "median", *shares)
    rows = []
    for name in names:
        is_idle = name == "client_queue_time" and result["max_concurrency"] is None
        if f"mean_{name}_ms" in result and not is_idle:
            keys = ("mean", "median", *shares)
            rows.append((NAMES.get(name, name), *(_with_interval(result, f"{key}_{name}_ms") for key in keys)))
    return Table("latency (95 % interval)", header, tuple(rows))


def _percentile_keys(result: dict[str, Any]) -> list[str]:
    found = {name.split("_")[0] for name in result if name.startswith("p") and name.endswith("_ttft_ms")}
    return sorted(found, key=lambda key: float(key[1:]))


def _with_interval(result: dict[str, Any], name: str) -> str:
    if name not in result:
        return "-"
    interval = result["confidence_intervals"].get(name)
    text = milliseconds(result[name])
    return text if interval is None else f"{text} ({milliseconds(interval[0])} - {milliseconds(interval[1])})"


def milliseconds(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def errors(result: dict[str, Any]) -> Table:
    """By code, then by reason."""
    rows = [(f"code {name}", str(count)) for name, count in result["whole_run"]["errors_by_code"].items()]
    rows += [(f"reason {name}", str(count)) for name, count in result["whole_run"]["errors_by_reason"].items()]
    return Table("errors, whole run", ("", "requests"), tuple(rows))


def lag(result: dict[str, Any]) -> Table:
    """How late the harness was itself."""
    keys = ("median", "p99", "max")
    values = tuple(milliseconds(result[f"{key}_schedule_lag_ms"]) for key in keys)
    return Table("lag of the harness, ms", ("", *keys), (("schedule lag", *values),))


def sweep_table(result: dict[str, Any]) -> Table:
    """A row per step, the slowest rate first."""
    rows = [
        (
            f"{step['request_rate']:.3g}",
            "yes" if step["holds"] else "no",
            f"{100 * step['slo_attained']:.1f}",
            f"{step['request_throughput']:.2f}",
            f"{step['request_goodput']:.2f}",
            f"{step['output_throughput']:.1f}",
            *(milliseconds(step[key]) if key in step else "-" for key in SWEEP_LATENCIES),
            "yes" if step["valid"] else "no",
        )
        for step in sorted(result.get("sweep", {}).get("steps", ()), key=lambda step: step["request_rate"])
    ]
    header = ("offered/s", "holds", "good %", "completed/s", "good/s", "tokens/s", "TTFT p50", "p99", "TPOT p50", "p99")
    return Table("sweep (latencies in ms)", (*header, "valid"), tuple(rows))


SWEEP_LATENCIES = ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms")


def faults(result: dict[str, Any]) -> Table:
    """What each fault did."""
    rows = [
        (
            each["fault"],
            str(each["requests_under_way"]),
            str(each["requests_lost"]),
            f"{each['changed']} of {each['compared']}",
            milliseconds(each["longest_stall_ms"]),
            f"{100 * each['slo_attained']:.1f} ({100 * each['slo_attained_undisturbed']:.1f})",
            "-" if each["tokens_per_s_dip"] is None else f"{100 * each['tokens_per_s_dip']:.0f}",
            "-" if each["recovery_seconds"] is None else f"{each['recovery_seconds']:.2f}",
        )
        for each in result.get("faults", ())
    ]
    header = ("fault", "under way", "lost", "changed", "stall ms", "good % (undisturbed)", "dip %", "back after s")
    return Table("faults", header, tuple(rows))


def server_tables(result: dict[str, Any]) -> list[Table]:
    """What the server's own metrics say of the window, an endpoint each."""
    tables = []
    for url, found in (result.get("server_metrics") or {}).get("endpoints", {}).items():
        if not found:
            continue
        rows = [(name, f"{value:.6g}", "", "") for name, value in found["counters"].items() if value]
        rows += [(name, f"{each['mean']:.4g}", "", f"{each['max']:.4g}") for name, each in found["gauges"].items()]
        rows += [
            (name, f"{each['mean']:.4g}", f"{each['p50']:.4g}", f"{each['p99']:.4g}")
            for name, each in found["histograms"].items()
        ]
        tables.append(Table(url, ("metric", "sum or mean", "p50", "p99 or most"), tuple(rows)))
    return tables


def all_tables(result: dict[str, Any]) -> list[Table]:
    """Those that have rows, in the order of a report."""
    found = [sweep_table(result), overview(result), latency_table(result), faults(result), errors(result), lag(result)]
    return [table for table in found if table.rows]
