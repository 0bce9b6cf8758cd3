"""Writes docs/metrics.md from the metrics themselves; with --check only says whether what is there is fresh."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prometheus_client import CollectorRegistry  # noqa: E402
from prometheus_client.core import Metric  # noqa: E402

from grokmoe.call_metrics import CallMetrics  # noqa: E402
from grokmoe.telemetry import AttentionMetrics, ExpertMetrics, LoopMetrics, RouterMetrics, new_registry  # noqa: E402
from router.fault_metrics import FaultCollector  # noqa: E402
from router.vllm_aliases import ALIASES, KV_USE  # noqa: E402

PAGE = ROOT / "docs" / "metrics.md"

HEAD = """\
# Metrics

Written by `tools/make_metrics.py` from the metrics themselves; change those. Every role serves them at `/metrics` of
its metrics port, which its METRICS line names. Times are seconds. Of a histogram there are `_bucket`, `_sum` and
`_count`. Dashboards and alerts made of them: [operations.md](operations.md).
"""

ALIASES_HEAD = """\
## vLLM's names

With `--vllm-metrics` the router has these a second time under vLLM's names, with the label `model_name`, for
dashboards and schedulers made for those. Counters end in `_total`.

| here | there |
| --- | --- |
"""


def described(metric: object) -> list[Metric]:
    """Families without values, as a metric or a collector describes them."""
    return list(metric.describe())  # type: ignore[attr-defined]


def rows(metrics: Iterable[object]) -> Iterator[str]:
    """Lines of a table, sorted by name."""
    found = []
    for metric in metrics:
        labels = getattr(metric, "_labelnames", None)
        for family in described(metric):
            names = labels if labels is not None else getattr(family, "_labelnames", ())
            name = f"{family.name}_total" if family.type == "counter" else family.name
            shown = ", ".join(f"`{label}`" for label in names)
            found.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    yield from sorted(found)


def text() -> str:
    """The page."""
    sections: dict[str, list[object]] = {
        "Router": [*vars(RouterMetrics(CollectorRegistry())).values(), FaultCollector],
        "Attention worker": [*vars(AttentionMetrics(CollectorRegistry())).values()],
        "Expert worker": [*vars(ExpertMetrics(CollectorRegistry())).values()],
        "Every role": [
            *vars(LoopMetrics(CollectorRegistry())).values(),
        ]
        + [
            each
            for each in (*vars(CallMetrics(CollectorRegistry(), {})).values(), *_collectors(new_registry()))
            if hasattr(each, "describe")
        ],
    }
    parts = [HEAD]
    for title, metrics in sections.items():
        parts.append(f"\n## {title}\n\n| name | kind | labels | |\n| --- | --- | --- | --- |\n")
        parts += [f"{row}\n" for row in rows(metrics)]
    parts.append("\nBeside them those of the process: CPU seconds, memory, descriptors, start (`process_*`).\n\n")
    parts.append(ALIASES_HEAD)
    parts += [f"| `{ours}` | `{theirs}` |\n" for ours, theirs in ALIASES.items()]
    parts.append(f"| `grokmoe_kv_pages`, used over all | `{KV_USE}` |\n")
    return "".join(parts)


def _collectors(registry: CollectorRegistry) -> list[object]:
    return list(registry._collector_to_names)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, complain of what is not fresh")
    wanted = text()
    if parser.parse_args().check:
        if not PAGE.exists() or PAGE.read_text() != wanted:
            print(f"{PAGE.name} is not fresh: run python tools/{Path(__file__).name}", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
