"""result.json: the figures under the names of vLLM's benchmark, and what it takes to believe or repeat them."""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grokmoe
from grokmoe import ModelInfo
from loadtest import latencies
from loadtest.metrics import intervals, measure, schedule_lag, select
from loadtest.record import Outcome, RequestRecord
from loadtest.server_view import view
from loadtest.session import Run
from loadtest.settings import LoadSettings
from loadtest.slo import Slo, parse_slo
from loadtest.window import steady, whole

SCHEMA_VERSION = 1


def slo_of(settings: LoadSettings) -> Slo:
    """The objectives."""
    return parse_slo(settings.goodput, settings.slo_share)


def assess(settings: LoadSettings, records: Sequence[RequestRecord]) -> dict[str, Any]:
    """The figures of the window, with their intervals, those of the whole run, and whether they can be believed."""
    slo, percentiles = slo_of(settings), settings.percentiles()
    window = steady(records, *settings.window_shares())
    figures = measure(records, window, slo, percentiles)
    selected = select(records, window)
    confidence: dict[str, list[float]] = {}
    for name in latencies.PER_REQUEST:
        confidence |= intervals(name, selected.values(name), percentiles, settings.seed)
    lag = schedule_lag(records)
    reason = invalid_because(settings, records, lag)
    return {
        **figures,
        **lag,
        "valid": not reason,
        "invalid_because": reason,
        "confidence_intervals": confidence,
        "whole_run": measure(records, whole(records), slo, percentiles),
    }


def invalid_because(settings: LoadSettings, records: Sequence[RequestRecord], lag: dict[str, float]) -> str:
    """Why the figures say nothing of the server; empty: they do."""
    if not any(record.outcome is Outcome.COMPLETED for record in records):
        return "no request completed"
    late = lag["p99_schedule_lag_ms"]
    if settings.is_timed and late > settings.max_lag_ms:
        return (
            f"the harness itself was late: the 99th percentile of its lag is {late:.1f} ms, the bound "
            f"{settings.max_lag_ms:g} ms (more --processes, or a machine that is not the server's)"
        )
    return ""


def build(
    settings: LoadSettings,
    run: Run,
    figures: dict[str, Any],
    model: ModelInfo,
    address: str,
    rate: float | None = None,
) -> dict[str, Any]:
    """All of result.json. rate: of the step of a sweep that the figures are of."""
    window = figures["window"]
    configured = settings.request_rate if rate is None else rate
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "grokmoe",
        "backend": "grokmoe",
        "label": settings.label,
        "model_id": model.name,
        "tokenizer_id": None,
        "num_prompts": len(run.plan),
        **dict(pair.split("=", 1) for pair in settings.metadata),
        "request_rate": configured if math.isfinite(configured) else "inf",
        "burstiness": settings.burstiness,
        "max_concurrency": settings.max_concurrency,
    }
    if settings.ramp_up_strategy is not None:
        names = ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps")
        result |= {name: getattr(settings, name) for name in names}
    slo = slo_of(settings)
    result |= figures
    result |= {
        "slo": {"limits_ms": {name: limit * 1e3 for name, limit in slo.limits}, "share": slo.share},
        "server_metrics": view(run.readings, run.begin, (window[0], window[1])) if run.readings else {},
        "server": {"address": address, **dataclasses.asdict(model)},
        "settings": _settings(settings),
        "machine": machine(),
        "client_version": grokmoe.__version__,
        "git": _git(),
    }
    return result | (detailed(run.records) if settings.save_detailed else {})


def detailed(records: Sequence[RequestRecord]) -> dict[str, list[Any]]:
    """Lists with an entry per request, in seconds, as vLLM's `--save-detailed` has them."""
    return {
        "input_lens": [record.input_len for record in records],
        "output_lens": [record.output_len for record in records],
        "ttfts": [latencies.ttft(record) or 0.0 for record in records],
        "itls": [latencies.itls(record) for record in records],
        "latencies": [latencies.e2el(record) or 0.0 for record in records],
        "start_times": [record.sent for record in records],
        "queue_times": [record.sent - record.woken for record in records],
        "errors": [record.message for record in records],
    }


def machine() -> dict[str, Any]:
    """Where the load came from."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }


def _settings(settings: LoadSettings) -> dict[str, Any]:
    """Those of the load; how to connect is nobody's business."""
    return {field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(LoadSettings)}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _git() -> str | None:
    """The commit of the checkout that this is, if it is one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
