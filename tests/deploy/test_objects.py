"""Every object of every case is what a cluster would take: strictly, against the published schemas."""

from __future__ import annotations

import json
import re
from pathlib import Path

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.rendered import (
    CASES,
    CHART,
    PROFILES,
    Object,
    containers,
    group_sets,
    objects,
    of_kind,
    pod_templates,
    title,
)

OLDEST, NEWEST = "1.31", "1.36"
"""The chart's kubeVersion, and the newest that there are schemas for in the wild."""

CRD_SCHEMAS = {path.stem: json.loads(path.read_text()) for path in Path(__file__).parent.glob("crds/*.json")}
"""Kind -> what of it the chart uses, closed: kubernetes_validate knows no custom resources."""


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("case", CASES)
def test_objects_are_valid(case: str, version: str) -> None:
    for each in objects(case):
        if each["kind"] in CRD_SCHEMAS:
            jsonschema.validate(each, CRD_SCHEMAS[each["kind"]])
            for made in group_sets(each) if each["kind"] == "LeaderWorkerSet" else ():
                kubernetes_validate.validate(made, version, strict=True)
        else:
            kubernetes_validate.validate(each, version, strict=True)


def test_every_schema_of_a_custom_resource_is_used_and_closed() -> None:
    used = {each["kind"] for case in CASES for each in objects(case)}
    assert set(CRD_SCHEMAS) <= used
    for kind, schema in CRD_SCHEMAS.items():
        assert schema["properties"]["spec"]["additionalProperties"] is False, kind
        example = next(each for case in CASES for each in objects(case) if each["kind"] == kind)
        spoilt = {**example, "spec": {**example["spec"], "bogus": 1}}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spoilt, schema)


@pytest.mark.parametrize("case", CASES)
def test_lint_has_no_findings(case: str) -> None:
    report = helm_python.lint(str(CHART), CASES[case], strict=True, kube_version=f"v{NEWEST}.0")
    findings = [message for message in report["messages"] if message["severity"] >= 2]
    assert not findings
    assert not report["errors"]


@pytest.mark.parametrize("case", CASES)
def test_names_are_unique_and_names(case: str) -> None:
    titles = [title(each) for each in objects(case)]
    assert len(titles) == len(set(titles))
    for each in objects(case):
        name = each["metadata"]["name"]
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
        # A StatefulSet's pods add an ordinal, and its revision's label a hash.
        assert len(name) <= (52 if each["kind"] in ("StatefulSet", "Deployment", "Job") else 63)


def test_a_long_release_name_still_gives_names() -> None:
    chart = helm_python.Chart.load(str(CHART))
    rendered = chart.render({}, name="a" * 53, namespace="n")
    for text in rendered.values():
        for name in re.findall(r"^  name: (\S+)$", text, re.MULTILINE):
            assert len(name) <= 63


@pytest.mark.parametrize("case", CASES)
def test_pods_are_restricted(case: str) -> None:
    """The Pod Security Standard `restricted`, a root file system that is read-only, and no token of the API."""
    for each, template in pod_templates(objects(case)):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False, title(each)
        assert spec["enableServiceLinks"] is False, "GROKMOE_PORT=tcp://... would be read as a setting"
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert not any("hostPath" in volume for volume in spec["volumes"])
    for each, _, container in containers(objects(case)):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, title(each)
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"], "a container without a bound takes its node's memory"


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_say_what_they_are_for(name: str) -> None:
    assert PROFILES[name].read_text().startswith("# ")


@pytest.mark.parametrize("case", CASES)
def test_secrets_are_files_never_variables(case: str) -> None:
    for _, _, container in containers(objects(case)):
        assert not container.get("envFrom")
        for variable in container.get("env", ()):
            assert "secretKeyRef" not in variable.get("valueFrom", {})
    assert not of_kind(objects(case), "Secret"), "the chart makes no secrets: they would be in the release's values"


def test_the_chart_is_the_projects_version() -> None:
    import tomllib

    chart: Object = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((CHART.parents[2] / "pyproject.toml").read_text())
    assert chart["version"] == chart["appVersion"] == project["project"]["version"]
