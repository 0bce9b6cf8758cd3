"""What is scraped and scaled by are metrics that the roles have, on the port that they have them on.

For what dashboards and alerts ask: test_dashboards.py, test_alerts.py.
"""

from __future__ import annotations

import re

import pytest
from prometheus_client import CollectorRegistry

from grokmoe.telemetry import RouterMetrics
from tests.deploy.rendered import CASES, matches, objects, of_kind

MONITORED = [case for case in CASES if of_kind(objects(case), "ServiceMonitor")]


def names_of(kind: type) -> set[str]:
    """Every name that a role's metrics give samples of, labels or not."""
    registry = CollectorRegistry()
    kind(registry)
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {family.name + suffix for family in registry.collect() for suffix in suffixes[family.type]}


def queried(text: str) -> set[str]:
    return set(re.findall(r"\bgrokmoe_[a-z_]+\b(?!\s*=)", text))


@pytest.mark.parametrize("case", ["high-availability", "given-secrets", "two-cells", "everything"])
def test_replicas_follow_a_queue_that_routers_report(case: str) -> None:
    for scaler in of_kind(objects(case), "ScaledObject"):
        for trigger in scaler["spec"]["triggers"]:
            assert queried(trigger["metadata"]["query"]) <= names_of(RouterMetrics)
            # What is scaled is asked for: cells by their own pods, attention workers by their router's.
            pods = re.search(r'pod=~"([^"]+)"', trigger["metadata"]["query"])[1]  # type: ignore[index]
            routers = [each["metadata"]["name"] for each in of_kind(objects(case), "Deployment")]
            asked = [name for name in routers if re.fullmatch(pods, f"{name}-5d9c7b-x2x4z")]
            target = scaler["spec"]["scaleTargetRef"]["name"]
            assert asked == [target if target in routers else target.replace("-attention-", "-router-")]
    for scaler in of_kind(objects(case), "HorizontalPodAutoscaler"):
        for metric in scaler["spec"]["metrics"]:
            assert metric[metric["type"].lower()]["metric"]["name"] in names_of(RouterMetrics)
    assert of_kind(objects(case), "ScaledObject", "HorizontalPodAutoscaler")


@pytest.mark.parametrize("case", MONITORED)
def test_every_metrics_port_is_scraped(case: str) -> None:
    (monitor,) = of_kind(objects(case), "ServiceMonitor")
    ports = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
    scraped: set[int] = set()
    for service in of_kind(objects(case), "Service"):
        if not matches(monitor["spec"]["selector"], service["metadata"]["labels"]):
            continue
        scraped |= {port["port"] for port in service["spec"]["ports"] if port["name"] in ports}
        assert any(port["name"] in ports for port in service["spec"]["ports"])
    told = {
        int(argument.partition("=")[2])
        for each in of_kind(objects(case), "Deployment", "StatefulSet")
        for container in each["spec"]["template"]["spec"]["containers"]
        for argument in container["args"]
        if argument.startswith("--metrics-port=")
    }
    assert scraped == told
    assert {endpoint["path"] for endpoint in monitor["spec"]["endpoints"]} == {"/metrics"}
