"""Dashboards: written by their program, and answered by what running processes export."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.deploy.monitored import dashboards, metrics_in, panels, program, queries, rules
from tests.deploy.rendered import CASES, DEPLOY, objects, of_kind
from tests.deploy.scraped import Running, running_cluster, running_prometheus

ROLES = ("router", "attention", "expert")

ANSWER_TIMEOUT = 240.0
"""Seconds within which every query has an answer; a rate needs two scrapes."""

QUIET = {"grokmoe_expert_worker_loads_total"}
"""What has no series before something has happened that does not happen here: experts are loaded while serving."""


def test_dashboards_are_fresh() -> None:
    pytest.importorskip("grafana_foundation_sdk")
    command = [sys.executable, str(DEPLOY / "make_dashboards.py"), "--check"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stderr


def test_panels_explain_themselves() -> None:
    assert set(dashboards()) == {"cluster.json", "router.json", "workers.json", "experts.json"}
    for name, dashboard in dashboards().items():
        assert dashboard["uid"] == f"grokmoe-{name.removesuffix('.json')}"
        titles = [panel["title"] for panel in panels(dashboard)]
        assert len(titles) >= 8
        for panel in panels(dashboard):
            assert panel["title"], name
            assert panel["description"].endswith("."), panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["gridPos"]["w"] > 0
            assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_every_query_is_of_the_chosen_namespaces() -> None:
    for dashboard in dashboards().values():
        for expression in queries(dashboard).values():
            for metric in metrics_in(expression):
                selectors = re.findall(rf"\b{metric}\b([^}}]*)", expression)
                assert all(selector.startswith('{namespace=~".*"') for selector in selectors), expression


def test_the_chart_brings_them_along() -> None:
    (found,) = [each for each in of_kind(objects("everything"), "ConfigMap") if "cluster.json" in each.get("data", ())]
    assert set(found["data"]) == set(dashboards())
    assert "everything" in CASES


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as found:
        found.work()
        yield found


def names_in(text: str) -> set[str]:
    """Every name that can be asked for, whether or not it has a series already."""
    suffixes = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
    kinds = re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE)
    return {name + suffix for name, kind in kinds for suffix in suffixes[kind]}


@pytest.mark.cluster
def test_what_is_asked_for_is_exported(cluster: Running) -> None:
    exported = {name for role in ROLES for name in names_in(cluster.scrape(role))}
    for name, dashboard in dashboards().items():
        for panel, expression in queries(dashboard).items():
            assert metrics_in(expression), panel
            assert metrics_in(expression) <= exported, f"{name}: {panel}"
    for rule in rules():
        assert metrics_in(rule["expr"]), rule["alert"]
        assert metrics_in(rule["expr"]) <= exported, rule["alert"]


@pytest.mark.cluster
@pytest.mark.parametrize("role", ROLES)
def test_names_are_as_prometheus_wants_them(cluster: Running, role: str) -> None:
    # vLLM's names have colons, which are meant for what is computed from others.
    lines = [line for line in cluster.scrape(role).splitlines(keepends=True) if "vllm:" not in line]
    told = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input="".join(lines),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


@pytest.mark.cluster
def test_a_prometheus_answers_every_query(cluster: Running, tmp_path_factory: pytest.TempPathFactory) -> None:
    program("prometheus")
    asked = {
        f"{name}: {panel}": expression
        for name, dashboard in dashboards().items()
        for panel, expression in queries(dashboard).items()
        if not metrics_in(expression) & QUIET
    }
    with running_prometheus(cluster, tmp_path_factory.mktemp("prometheus")) as prometheus:
        assert len(prometheus.query("vector(1)")) == 1
        deadline = time.monotonic() + ANSWER_TIMEOUT
        missing = set(asked)
        while missing and time.monotonic() < deadline:
            cluster.work()  # rates are of what happens while it looks
            missing = {panel for panel in missing if not prometheus.query(asked[panel])}
        assert not missing
        for rule in rules():
            prometheus.query(rule["expr"])
