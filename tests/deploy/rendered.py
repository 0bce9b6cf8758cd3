"""The chart, rendered with no cluster: values in, objects out."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "grokmoe"
IMAGE_PACKAGES = DEPLOY / "image"
PROFILES = {path.stem: path for path in sorted((CHART / "profiles").glob("*.yaml"))}

RELEASE = "demo"
NAMESPACE = "testing"

Object = dict[str, Any]

WAITS_FOR = "# Waits for: "
"""First words of a profile for something that the roles do not have yet: `ROLE FLAG`."""

CHECKSUMS = f"{'a' * 64}  config.json\n{'b' * 64}  model.safetensors\n"

BOUND = {"limits": {"memory": "1Gi"}}

VARIANTS: Mapping[str, Object] = {
    "defaults": {},
    "download": {
        "model": {
            "source": "download",
            "path": "grok-1",
            "numLayers": 64,
            "download": {"baseUrl": "https://example.com/grok-1", "checksums": CHECKSUMS, "tokenSecret": "hub"},
        },
    },
    "two-cells": {
        "cells": {"shape": "split", "count": 2},
        "attention": {"replicas": 3, "shm": "1Gi", "env": [{"name": "TZ", "value": "UTC"}]},
        "autoscaling": {"kind": "hpa"},
        "networkPolicy": {"enabled": True, "monitoring": [{"namespaceSelector": {}}]},
        "router": {"extraArgs": ["--log-level=debug"], "podLabels": {"team": "a"}, "podAnnotations": {"a": "b"}},
    },
    "everything": {
        "cells": {"shape": "pod", "count": 2},
        "model": {"source": "claim", "claim": "weights", "path": "a/b", "name": "served"},
        "experts": {
            "settings": {"threads": 2, "deterministic": True},
            "pools": [
                {"name": "all", "pods": ["all"], "copies": 2, "device": "cpu", "shm": "2Gi", "resources": BOUND},
                {
                    "name": "card",
                    "pods": ["0-3@0-1+4,5", "6-7"],
                    "device": "cuda",
                    "gpu": {"count": 1},
                    "settings": {"threads": 1},
                    "resources": BOUND,
                },
            ],
        },
        "tls": {
            "workers": {"enabled": True, "issuer": {"name": "cluster"}},
            "clients": {"enabled": True, "mutual": True, "issuer": {"name": "public", "kind": "ClusterIssuer"}},
        },
        "tokens": {"clientsSecret": "clients", "clusterSecret": "cluster"},
        "autoscaling": {"kind": "hpa"},
        "tracing": {"url": "http://collector:4317", "share": 0.1, "collector": [{"namespaceSelector": {}}]},
        "logFormat": "text",
        "monitoring": {name: {"enabled": True} for name in ("serviceMonitor", "prometheusRule", "dashboards")},
        "gateway": {
            "grpcRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}], "hostnames": ["grok.example.com"]},
            "inferencePool": {"enabled": True, "endpointPicker": "picker"},
        },
        "image": {"repository": "registry.example.com/grokmoe", "tag": "1", "pullSecrets": [{"name": "pull"}]},
        "extraObjects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-extra"}}],
    },
    "pairs": {
        "router": {"settings": {"expert-transport": "gloo"}, "env": [{"name": "GLOO_SOCKET_IFNAME", "value": "eth0"}]},
    },
    "gateway": {
        "cells": {"shape": "split", "count": 3},
        "gateway": {"openai": {"enabled": True, "replicas": 2, "settings": {"log-level": "debug"}}},
        "networkPolicy": {"enabled": True, "clients": [{"namespaceSelector": {}}]},
        "tracing": {"url": "http://collector", "collector": [{"namespaceSelector": {}}]},
        "monitoring": {"serviceMonitor": {"enabled": True}},
    },
    "stages": {
        "cells": {"shape": "split", "count": 2},
        "attention": {"replicas": 2, "stageLayers": ["0", "1-3"]},
        "networkPolicy": {"enabled": True, "monitoring": [{"namespaceSelector": {}}]},
    },
    "given-secrets": {
        "tls": {
            "workers": {"enabled": True, "serverSecret": "server", "clientSecret": "client"},
            "clients": {"enabled": True, "secret": "public"},
        },
        "autoscaling": {"kind": "keda"},
        "listenHost": "[::]",
    },
}
"""Values for what no profile uses."""


def profile(name: str) -> Object:
    """The values of a ready-made file."""
    values: Object = yaml.safe_load(PROFILES[name].read_text())
    return values


def waits_for(name: str) -> list[tuple[str, str]]:
    """What a profile needs that does not exist yet, as (role, argument)."""
    lines = PROFILES[name].read_text().splitlines()
    found = [line.removeprefix(WAITS_FOR).split(" ", 1) for line in lines if line.startswith(WAITS_FOR)]
    return [(role, argument) for role, argument in found]


CASES: Mapping[str, Object] = {**{name: profile(name) for name in PROFILES}, **VARIANTS}
"""Every set of values that is looked at."""


@functools.cache
def _chart() -> helm_python.Chart:
    return helm_python.Chart.load(str(CHART))


def render(values: Object) -> dict[str, str]:
    """Template -> text. Raises helm_python.HelmError, also for what the schema refuses."""
    rendered = _chart().render(values, name=RELEASE, namespace=NAMESPACE)
    return {name.removeprefix("grokmoe/templates/"): text for name, text in rendered.items()}


def objects_of(values: Object) -> list[Object]:
    """All objects, hooks included."""
    texts = [text for name, text in render(values).items() if name.endswith(".yaml")]
    return [found for text in texts for found in yaml.safe_load_all(text) if found]


@functools.cache
def objects(case: str) -> list[Object]:
    """The objects of a case; not to be changed."""
    return objects_of(CASES[case])


def of_kind(found: list[Object], *kinds: str) -> list[Object]:
    """Those of some kinds."""
    return [each for each in found if each["kind"] in kinds]


def title(found: Object) -> str:
    """Such as `StatefulSet/demo-grokmoe-attention-0`."""
    return f"{found['kind']}/{found['metadata']['name']}"


def pod_templates(found: list[Object]) -> Iterator[tuple[Object, Object]]:
    """Every (object, pod template) of workloads, Jobs and single pods."""
    for each in found:
        if each["kind"] == "Pod":
            yield each, each
        elif "template" in each.get("spec", {}):
            yield each, each["spec"]["template"]


def containers(found: list[Object]) -> Iterator[tuple[Object, Object, Object]]:
    """Every (object, pod template, container), init containers included."""
    for each, template in pod_templates(found):
        for container in [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]:
            yield each, template, container


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a LabelSelector, or the plain map of a Service, selects these labels."""
    wanted = selector.get("matchLabels", selector)
    return all(labels.get(key) == value for key, value in wanted.items())
