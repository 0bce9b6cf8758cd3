"""Records and results as a run would have left them, with times by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grokmoe import ModelInfo
from loadtest.planned import Input, plan_requests
from loadtest.record import Outcome, RequestRecord
from loadtest.result import assess, build
from loadtest.session import Run
from loadtest.settings import LoadSettings

MODEL = ModelInfo("tiny", "hash", 1000, 1024, 2, 8, 2, 64, (2,), False, "float32", None)


def completed(
    scheduled: float, arrivals: Sequence[float], counts: Sequence[int] | None = None, index: int = 0, **changes: Any
) -> RequestRecord:
    """Sent when it was scheduled, ended with its last token, 10 tokens in."""
    fields: dict[str, Any] = {
        "index": index,
        "scheduled": scheduled,
        "woken": scheduled,
        "sent": scheduled,
        "arrivals": list(arrivals),
        "counts": list(counts or [1] * len(arrivals)),
        "end": arrivals[-1],
        "outcome": Outcome.COMPLETED,
        "input_len": 10,
        "digest": "same",
    }
    return RequestRecord(**{**fields, **changes})


def steady_run(
    num: int = 50, ttft: float = 0.1, tpot: float = 0.02, tokens: int = 10, every: float = 0.2
) -> list[RequestRecord]:
    """Like one another but for a jitter of a tenth that depends on the index only."""
    records = []
    for index in range(num):
        jitter = 0.9 + 0.2 * ((index * 7919) % 101) / 100
        begin = every * index
        arrivals = [begin + jitter * (ttft + token * tpot) for token in range(tokens)]
        records.append(completed(begin, arrivals, index=index))
    return records


def result_of(records: Sequence[RequestRecord], settings: LoadSettings | None = None) -> dict[str, Any]:
    """As `grokmoe loadtest` would write it."""
    settings = settings or LoadSettings(request_rate=5.0, num_prompts=len(records))
    plan = plan_requests([Input((5, 6), 10)] * len(records), [record.scheduled for record in records])  # type: ignore[arg-type]
    run = Run(tuple(plan), tuple(records), 0.0, {})
    return build(settings, run, assess(settings, records), MODEL, "127.0.0.1:1")
