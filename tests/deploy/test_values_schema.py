"""Values that cannot be are refused before anything is made of them: one case per rule."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import helm_python
import pytest

from deploy.chart_schema import SET_BY_CHART, TARGET, schema, text
from grokmoe.server import ServerSettings
from router.config import RouterSettings
from tests.deploy.rendered import BOUND, Object, objects_of

POOL = {"name": "p", "pods": ["all"], "device": "cpu", "resources": BOUND}


def at(path: str, value: Any) -> Object:
    """Values with one thing in them. path: with dots."""
    *parents, last = path.split(".")
    values: Object = {}
    here = values
    for name in parents:
        here = here.setdefault(name, {})
    here[last] = value
    return values


def a_pool(**changes: Any) -> Object:
    """Values whose only pool has these changes; None: without the key."""
    merged = {key: value for key, value in (POOL | changes).items() if value is not None}
    return at("experts.pools", [merged])


REFUSED: dict[str, Object] = {
    # Unknown keys, at every level where a typo would be lost.
    "an unknown key": at("replicas", 3),
    "a typo in image": at("image.repo", "x"),
    "a typo in model": at("model.dtyp", "float32"),
    "a typo in router": at("router.resource", {}),
    "a typo in attention": at("attention.replica", 2),
    "a typo in experts": at("experts.pool", []),
    "a typo in a pool": a_pool(replicas=2),
    "a typo in tls": at("tls.client", {}),
    # Flags of the roles.
    "a flag that no router has": at("router.settings", {"max-runing": 4}),
    "a flag with underscores": at("router.settings", {"max_running": 4}),
    "a flag that the chart sets": at("router.settings", {"listen": "0.0.0.0:1"}),
    "a router's flag for an expert worker": at("experts.settings", {"max-running": 4}),
    "a flag of the wrong type": at("router.settings", {"max-running": "many"}),
    "a fraction for a whole number": at("attention.settings", {"page-size": 1.5}),
    "a number for a switch": at("attention.settings", {"deterministic": 1}),
    "a choice that is none": at("router.settings", {"log-level": "loud"}),
    "a device that attention workers have not": at("attention.device", "tpu"),
    "a setting as a variable": at("router.env", [{"name": "GROKMOE_MAX_RUNNING", "value": "4"}]),
    "an argument that is no flag": at("router.extraArgs", ["max-running"]),
    # The model.
    "a source that is none": at("model.source", "s3"),
    "a claim without a name": at("model.source", "claim"),
    "a download from nowhere": at("model", {"source": "download", "download": {"checksums": "a" * 64 + "  f"}}),
    "a download without checksums": at("model", {"source": "download", "download": {"baseUrl": "https://x/y"}}),
    "checksums that are none": at(
        "model", {"source": "download", "download": {"baseUrl": "https://x/y", "checksums": "md5 f"}}
    ),
    "a download by ftp": at("model.download", {"baseUrl": "ftp://x/y"}),
    "a path out of the volume": at("model.path", "../etc"),
    "an absolute path": at("model.path", "/etc"),
    "another size of the demo model": at("model.numLayers", 64),
    "a model without layers": at("model", {"source": "claim", "claim": "c", "numLayers": 0}),
    "a type that workers do not compute in": at("model.dtype", "float16"),
    "a volume that many cannot read": at("model.download.accessModes", ["ReadOnlyMany"]),
    "a size without a unit that there is": at("model.download.size", "700GB"),
    # Experts.
    "no pools": at("experts.pools", []),
    "a pool without pods": a_pool(pods=[]),
    "a pool without a name": a_pool(name=None),
    "a pool's name that is no label": a_pool(name="H100"),
    "a pool without a device": a_pool(device=None),
    "a device that is none": a_pool(device="tpu"),
    "a card that the pod does not get": a_pool(device="cuda"),
    "no card for a card": a_pool(device="cuda", gpu={"count": 0}),
    "a card for nothing": a_pool(device="cpu", gpu={"count": 1}),
    "no copies": a_pool(copies=0),
    "half a copy updated": at("experts.updatedCopies", 0.5),
    "experts in words": a_pool(pods=["zero to seven"]),
    "experts with a blank": a_pool(pods=["0-3, 4-7"]),
    "experts with nothing between": a_pool(pods=["0-7+"]),
    "layers of nothing": a_pool(pods=["all", "@0-3"]),
    "all among others": a_pool(pods=["all,1"]),
    "experts as a number": a_pool(pods=[7]),
    "a worker without a bound of memory": a_pool(resources={"requests": {"memory": "1Gi"}}),
    **{
        f"nobody for expert {expert}": a_pool(pods=[",".join(str(other) for other in range(8) if other != expert)])
        for expert in range(8)
    },
    "a range that ends too early": a_pool(pods=["0-3", "4-6"]),
    "an expert only in the layers' part": a_pool(pods=["0-6@7"]),
    # Cells.
    "a shape that is none": at("cells.shape", "round"),
    "no cells": at("cells.count", 0),
    "attention workers beside no router": at("cells.shape", "pod") | at("attention.replicas", 2),
    "stages beside one router": at("cells.shape", "pod") | at("attention.stageLayers", ["0-1", "2-3"]),
    "stages that come and go": at("autoscaling.kind", "hpa") | at("attention.stageLayers", ["0-1", "2-3"]),
    "stages without layers": at("attention.stageLayers", [""]),
    "stages in words": at("attention.stageLayers", ["all"]),
    # Time.
    "no time to end": at("router.grace", 0),
    "a budget that nothing starts in": at("experts.startupBudget", 5),
    # Security.
    "mutual TLS without TLS": at("tls.clients", {"mutual": True}),
    "TLS of clients from nowhere": at("tls.clients.enabled", True),
    "TLS of workers from nowhere": at("tls.workers.enabled", True),
    "half of the workers' secrets": at("tls.workers", {"enabled": True, "serverSecret": "s"}),
    "an issuer of no kind": at("tls.workers.issuer", {"name": "a", "kind": "Vault"}),
    "a secret's name that is none": at("tokens.clientsSecret", "My Secret"),
    # The rest.
    "a privileged port": at("ports.router.grpc", 443),
    "a port that is none": at("ports.experts.health", 70000),
    "a host that is none": at("listenHost", "localhost"),
    "a Service that is none": at("service.type", "ExternalName"),
    "spread by hope": at("spread.whenUnsatisfiable", "Hope"),
    "anti-affinity that is none": at("antiAffinity", "soft"),
    "an autoscaler that is none": at("autoscaling.kind", "vpa"),
    "autoscaling to nothing": at("autoscaling.min", 0),
    "a threshold of nothing": at("autoscaling.waitingPerReplica", 0),
    "Prometheus without http": at("autoscaling.prometheusUrl", "prometheus:9090"),
    "an interval without a unit": at("monitoring.serviceMonitor.interval", "15"),
    "a route from no gateway": at("gateway.grpcRoute.enabled", True),
    "a gateway that has no TLS before routers that want it": at("gateway.openai.enabled", True)
    | at("tls.clients", {"enabled": True, "secret": "s"}),
    "a gateway that has no token before routers that want one": at("gateway.openai.enabled", True)
    | at("tokens.clientsSecret", "s"),
    "a flag that no gateway has": at("gateway.openai.settings", {"policy": "random"}),
    "no gateways": at("gateway.openai.replicas", 0),
    "traces to no URL": at("tracing.url", "collector:4317"),
    "more traces than requests": at("tracing.share", 1.5),
    "a log for nobody": at("logFormat", "xml"),
    "a pool without a picker": at("gateway.inferencePool.enabled", True),
    "a label that is no text": at("router.podLabels", {"a": 1}),
    "memory in words": at("router.resources", {"limits": {"memory": "a lot"}}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_by_the_schema(what: str) -> None:
    with pytest.raises(helm_python.HelmError) as refused:
        objects_of(copy.deepcopy(REFUSED[what]))
    assert "don't meet the specifications of the schema" in str(refused.value), str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        a_pool(pods=["all"]),
        a_pool(pods=["0-3@0-1+4-7", "0-3@2-3"]),
        a_pool(device="cuda", gpu={"count": 1}),
        at("attention.settings", {"deterministic": True, "log-level": "debug", "lease-seconds": 5}),
        at("tls.workers", {"enabled": True, "serverSecret": "s", "clientSecret": "c"}),
        at("cells.shape", "pod"),
        at("gateway.openai.enabled", True),
    ],
    ids=["all", "layers", "card", "settings", "secrets", "pod", "gateway"],
)
def test_what_can_be_is_not_refused(values: Object) -> None:
    assert objects_of(values)


def test_the_schema_is_fresh() -> None:
    """`python deploy/chart_schema.py` writes it anew; a role's flag that came or went is seen here."""
    assert TARGET.read_text() == text()


def test_every_field_that_the_chart_sets_exists() -> None:
    for kind, names in SET_BY_CHART.items():
        assert names <= {field.name for field in dataclasses.fields(kind)}


def test_every_other_flag_may_be_set() -> None:
    flags = schema()["definitions"]["routerSettings"]["properties"]
    every = {field.name for kind in (RouterSettings, ServerSettings) for field in dataclasses.fields(kind)}
    assert {name.replace("-", "_") for name in flags} == every - SET_BY_CHART[RouterSettings] - SET_BY_CHART[
        ServerSettings
    ]
