"""The rendered pods, run: their own commands, files, probes and end, on this machine instead of a cluster."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from grokmoe import Client, DeadlineExceeded, Unauthenticated, Unavailable
from tests.deploy.local_pods import Cluster
from tests.deploy.rendered import BOUND, Object, objects_of, profile
from tests.security.certificates import Authority

pytestmark = pytest.mark.cluster

PROMPT = "To be, or not"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for Unix sockets, which pytest's own is not."""
    made = Path(tempfile.mkdtemp(prefix="pods-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


def run(cluster: Cluster) -> None:
    """Starts all pods but the test's, as a cluster does: at once, in any order."""
    cluster.create()
    for component in ("router", "attention", "expert"):
        for pod in cluster.of(component):
            cluster.start(pod)
    for component in ("expert", "attention", "router"):
        for pod in cluster.of(component):
            cluster.wait_started(pod)
    for pod in cluster.of("router"):
        cluster.wait(pod, "readinessProbe", True)


def helm_test(cluster: Cluster) -> str:
    """Runs the pod of `helm test` and returns what it wrote."""
    (pod,) = cluster.of("test")
    cluster.start(pod)
    process = pod.processes.pop("generate")
    code = process.wait(60)
    process.reader.join(60)  # type: ignore[attr-defined]
    assert code == 0, pod.said
    return "\n".join(pod.said["generate"])


def metrics(address: str, port: int) -> str:
    text: str = urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=10).read().decode()
    return text


def test_the_laptop_profile_generates_text(folder: Path) -> None:
    cluster = Cluster(objects_of(profile("laptop")), folder)
    try:
        run(cluster)
        assert len(cluster.of("expert")) == 4
        assert helm_test(cluster).startswith(PROMPT)
        (router,) = cluster.of("router")
        with Client(cluster.service("demo-grokmoe", 50051)) as client:
            before = client.generate(PROMPT, max_tokens=12, temperature=0)
            placement = client.status().placement
            # Two copies of two pods: every expert has two holders.
            assert [len(placed.workers) for placed in placement] == [2] * 8

            # Every probe of every container says yes, on the port that the pod says.
            for pod in cluster.of("router") + cluster.of("attention") + cluster.of("expert"):
                for name in pod.processes:
                    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                        assert cluster.probe(pod, name, kind), (pod.name, kind)
            ports = {"router": 9091, "attention": 9092, "expert": 9093}
            for component, port in ports.items():
                assert "grokmoe_" in metrics(cluster.of(component)[0].address, port)

            # One copy goes: nothing happens to a client.
            first, second = [pod for pod in cluster.of("expert") if pod.name.endswith("-0")]
            assert cluster.delete(first) == {"expert": 0}
            after = client.generate(PROMPT, max_tokens=12, temperature=0)
            assert after.token_ids == before.token_ids
            assert cluster.probe(router, "router", "readinessProbe")

            # The other goes as well: no traffic, but no restart either. Who asks finds out, and waits in vain.
            assert cluster.delete(second) == {"expert": 0}
            with pytest.raises((DeadlineExceeded, Unavailable)):
                client.generate(PROMPT, max_tokens=1, timeout=2, temperature=0)
            cluster.wait(router, "readinessProbe", False)
            assert cluster.probe(router, "router", "livenessProbe")

            # A pod comes back by itself.
            cluster.start(first)
            cluster.wait_started(first)
            cluster.wait(router, "readinessProbe", True)
            again = client.generate(PROMPT, max_tokens=12, temperature=0)
            assert again.token_ids == before.token_ids
        for pod in cluster.of("router") + cluster.of("attention") + cluster.of("expert"):
            assert set(cluster.delete(pod).values()) <= {0}
    finally:
        cluster.kill()


def test_ranks_in_pods_of_their_own_are_one_worker(folder: Path) -> None:
    """The first serves, the other does as it does; without either there is no worker, and the two are made anew."""
    cluster = Cluster(objects_of(profile("laptop-ranks")), folder)
    try:
        cluster.create()
        ((leader,), (rank,), (router,)) = (cluster.of(name) for name in ("attention", "attention-rank", "router"))
        cluster.start(rank)  # may come first: it waits for the other
        for pod in (router, leader, *cluster.of("expert")):
            cluster.start(pod)
        for pod in (*cluster.of("expert"), leader, router):
            cluster.wait_started(pod)
        cluster.wait(router, "readinessProbe", True)
        with Client(cluster.service("demo-grokmoe", 50051)) as client:
            before = client.generate(PROMPT, max_tokens=12, temperature=0)
            assert client.status().workers[0].device == "cpu x 2"

            cluster.lose(rank)
            assert leader.processes["attention"].wait(30) != 0
            leader.processes = {}
            for pod in (leader, rank):  # as the controller does
                cluster.start(pod)
            cluster.wait_started(leader)
            cluster.wait(router, "readinessProbe", True)
            after = client.generate(PROMPT, max_tokens=12, temperature=0, timeout=60)
            assert after.token_ids == before.token_ids

            # A node is emptied: the rank on it is asked to end, and the worker ends in order.
            assert cluster.delete(rank) == {"rank": 0}
            assert leader.processes["attention"].wait(30) == 0
            leader.processes = {}
        for pod in (router, *cluster.of("expert")):
            assert set(cluster.delete(pod).values()) <= {0}
    finally:
        cluster.kill()


def secured(folder: Path) -> tuple[Object, dict[str, dict[str, str]], Authority]:
    """Values with all of TLS and tokens, the Secrets that they name, and who vouches for the router."""
    workers, public = Authority(folder, "workers"), Authority(folder, "public")
    values = {
        "cells": {"shape": "pod", "count": 1},
        "antiAffinity": "preferred",
        "attention": {"kvGib": 0.1, "settings": {"threads": 1}},
        "experts": {"pools": [{"name": "all", "pods": ["all"], "device": "cpu", "resources": BOUND}]},
        "tls": {
            "workers": {"enabled": True, "serverSecret": "server", "clientSecret": "client"},
            "clients": {"enabled": True, "secret": "public"},
        },
        "tokens": {"clientsSecret": "clients", "clusterSecret": "cluster"},
    }
    # Of workers the one name that the chart says, and no address: routers find workers by address.
    pairs = {
        "server": (workers.issue("grokmoe-workers"), workers.ca),
        "client": (workers.issue("demo-grokmoe-router"), workers.ca),
        "public": (public.server(), public.ca),
    }
    secrets = {
        name: {"tls.crt": pair.certificate, "tls.key": pair.key, "ca.crt": ca} for name, (pair, ca) in pairs.items()
    }
    words = {
        "clients": {
            "tokens": "helm:token-of-the-test\noperator:inference+control:token-of-the-operator\n",
            "test": "token-of-the-test",
        },
        "cluster": {"tokens": "router:cluster:token-of-the-cluster\n", "token": "token-of-the-cluster"},
    }
    for name, keys in words.items():
        secrets[name] = {}
        for key, text in keys.items():
            path = folder / f"{name}-{key}"
            path.write_text(text)
            secrets[name][key] = str(path)
    return values, secrets, public


def test_a_cell_in_one_pod_with_tls_and_tokens(folder: Path) -> None:
    """Router and attention worker on a socket, mutual TLS to the experts found by address, tokens for everybody."""
    values, secrets, public = secured(folder)
    cluster = Cluster(objects_of(values), folder, secrets)
    try:
        run(cluster)
        (cell,) = cluster.of("router")
        assert set(cell.processes) == {"router", "attention"}
        for name in cell.processes:
            assert cluster.probe(cell, name, "readinessProbe")
            assert cluster.probe(cell, name, "livenessProbe")
        address = cluster.service("demo-grokmoe", 50051)
        tls = dataclasses.replace(public.client(), server_name="localhost")
        with Client(address, tls=tls, token="token-of-the-operator") as client:
            assert client.generate(PROMPT, max_tokens=4, temperature=0).text
            assert len(client.status().workers) == 2
        with Client(address, tls=tls) as client, pytest.raises(Unauthenticated):
            client.generate(PROMPT, max_tokens=1)
        assert set(cluster.delete(cell).values()) == {0}
        for pod in cluster.of("expert"):
            assert set(cluster.delete(pod).values()) == {0}
    finally:
        cluster.kill()
