"""The router's state as a page: the same as `grokmoe top`, and rows per layer and expert."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from prometheus_client import Counter

from grokmoe.metrics_http import Page
from router import status
from router.engine import Engine

PAGE = Path(__file__).with_name("status_page.html")

SNAPSHOT_TIMEOUT = 5.0
"""Seconds the event loop has to tell its state."""


def status_pages(engine: Engine, model_name: str) -> Mapping[str, Page]:
    """Path -> page. To be called on the engine's event loop, which is asked whenever somebody looks."""
    loop, html = asyncio.get_running_loop(), PAGE.read_bytes()

    async def take() -> dict[str, Any]:
        return snapshot(engine, model_name)

    def state() -> bytes:
        asked = asyncio.run_coroutine_threadsafe(take(), loop)
        try:
            return json.dumps(asked.result(SNAPSHOT_TIMEOUT)).encode()
        except TimeoutError:
            asked.cancel()
            raise

    return {"/": ("text/html; charset=utf-8", lambda: html), "/status.json": ("application/json", state)}


def snapshot(engine: Engine, model_name: str) -> dict[str, Any]:
    """GetStatus as JSON has it, and beside it what only a page shows. Counts are since start."""
    told = MessageToDict(
        status.cluster(engine), preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    config, metrics = engine.config, engine.metrics
    return {
        "model": model_name,
        "num_layers": config.num_layers,
        "num_experts": config.num_experts,
        "prompt_tokens": _total(metrics.prompt_tokens),
        "generated_tokens": _total(metrics.generated_tokens),
        "straggler_seconds": _by_label(metrics.straggler_time, "worker"),
        "rows": engine.counter.rows_LE,
        "is_serving": engine.is_serving,
        **told,
    }


def _by_label(counter: Counter, label: str) -> dict[str, float]:
    samples = [sample for family in counter.collect() for sample in family.samples]
    return {sample.labels[label]: sample.value for sample in samples if sample.name.endswith("_total")}


def _total(counter: Counter) -> float:
    return sum(
        sample.value for family in counter.collect() for sample in family.samples if sample.name.endswith("_total")
    )
