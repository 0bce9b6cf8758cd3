"""Alerts: what they ask for exists, they fire when they should, and whoever they wake finds what to do."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml

from tests.deploy.monitored import program, rules
from tests.deploy.rendered import CASES, CHART, DEPLOY, ROOT, objects, objects_of, of_kind

UNIT_TESTS = DEPLOY / "alerts" / "tests.yaml"

ALERTING = [case for case in CASES if of_kind(objects(case), "PrometheusRule")]


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program("promtool"), *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=DEPLOY
    )


def test_promtool_takes_the_rules() -> None:
    told = promtool("check", "rules", str(CHART / "files" / "alerts.yaml"))
    assert told.returncode == 0, told.stdout + told.stderr
    assert f"{len(rules())} rules found" in told.stdout


def test_alerts_fire_when_they_should() -> None:
    told = promtool("test", "rules", str(UNIT_TESTS))
    assert told.returncode == 0, told.stdout + told.stderr


def test_every_alert_is_shown_to_fire() -> None:
    shown: set[str] = set()
    for case in yaml.safe_load(UNIT_TESTS.read_text())["tests"]:
        for query in case.get("promql_expr_test", ()):
            # Either the query names one alert, or its results say which.
            results = " ".join(sample["labels"] for sample in query["exp_samples"])
            named = re.findall(r'alertname="(\w+)"', results) or re.findall(r'alertname="(\w+)"', query["expr"])
            shown |= set(named) if query["exp_samples"] else set()
        shown |= {rule["alertname"] for rule in case.get("alert_rule_test", ()) if rule["exp_alerts"]}
    assert shown == {rule["alert"] for rule in rules()}


def test_every_alert_says_what_to_do() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    headings = set(re.findall(r"^### (\w+)$", page, re.MULTILINE))
    assert headings >= {rule["alert"] for rule in rules()}
    named = {heading for heading in headings if heading.startswith("Grokmoe")}
    assert named == {rule["alert"] for rule in rules()}, "a runbook for an alert that is no more"
    for rule in rules():
        assert rule["annotations"]["runbook_url"] == f"RUNBOOKS#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert {"summary", "description"} < rule["annotations"].keys()


@pytest.mark.parametrize("case", ALERTING)
def test_the_chart_brings_them_along(case: str) -> None:
    (found,) = of_kind(objects(case), "PrometheusRule")
    brought = [rule for group in found["spec"]["groups"] for rule in group["rules"]]
    assert [rule["alert"] for rule in brought] == [rule["alert"] for rule in rules()]
    assert {rule["annotations"]["runbook_url"].partition("#")[0] for rule in brought} == {"docs/operations.md"}


def test_runbooks_can_be_elsewhere() -> None:
    values = {"monitoring": {"prometheusRule": {"enabled": True, "runbooks": "https://wiki.example.com/grokmoe"}}}
    (found,) = of_kind(objects_of(values), "PrometheusRule")
    rule = found["spec"]["groups"][0]["rules"][0]
    assert rule["annotations"]["runbook_url"] == "https://wiki.example.com/grokmoe#grokmoenorouter"
