"""What dashboards and alerts ask Prometheus, and Prometheus' own programs, where there are any."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.deploy.rendered import CHART, ROOT, Object

BUILT_IN = ("process_cpu_seconds_total", "process_resident_memory_bytes")

_NAME = re.compile(r"\b(?:grokmoe|grpc_server|process|vllm)[a-z_:]*\b")


def dashboards() -> dict[str, Object]:
    """By file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted((CHART / "files" / "dashboards").glob("*.json"))}


def panels(dashboard: Object) -> list[Object]:
    """All that show something, those of rows included."""
    found = [*dashboard["panels"], *(inner for panel in dashboard["panels"] for inner in panel.get("panels", ()))]
    return [panel for panel in found if panel["type"] != "row"]


def queries(dashboard: Object) -> dict[str, str]:
    """Panel and reference -> what is asked, with Grafana's variables filled in."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        .replace("$__rate_interval", "1m")
        .replace("$namespace", ".*")
        for panel in panels(dashboard)
        for target in panel["targets"]
    }


def rules() -> list[Object]:
    """All alerts."""
    groups = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def metrics_in(expression: str) -> set[str]:
    """Names of metrics, without what is compared with labels."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    return set(_NAME.findall(bare))


def program(name: str) -> str:
    """`prometheus` or `promtool`: on the path, or where tools/get_prometheus.py puts them. Skips the test without."""
    folder = os.environ.get("GROKMOE_PROMETHEUS", str(ROOT / "build" / "prometheus"))
    found = shutil.which(name) or shutil.which(str(Path(folder) / "usr" / "bin" / name))
    if found is None:
        pytest.skip(f"no {name} here; python tools/get_prometheus.py fetches it where there is Debian's apt-get")
    return found
