"""A running `grokmoe up`, and a Prometheus that scrapes it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from grokmoe import Client
from launcher.openai import free_port
from tests import goldens
from tests.cluster.command import running
from tests.deploy.monitored import program

UP = (
    "up", "--model", str(goldens.DIRECTORY), "--dtype", "float32", "--port", "0", "--kv-gib", "0.001", "--experts", "2",
    "--expert-replicas", "2", "--vllm-metrics",
)  # fmt: skip

START_TIMEOUT = 120.0

SCRAPE_INTERVAL = "1s"


class Running:
    """The cluster's addresses."""

    def __init__(self, address: str, processes: list[dict[str, Any]]) -> None:
        self.address, self.processes = address, processes

    def work(self) -> None:
        """A few requests, so that there is something to count."""
        with Client(self.address, timeout=120) as client:
            for seed in range(2):
                client.generate([3, 4, 5, 6, 7], max_tokens=4, seed=seed, ignore_eos=True)

    def scrape(self, role: str) -> str:
        """The metrics of the first process of a role, as Prometheus would read them."""
        return get(f"http://{self.metrics(role)}/metrics").decode()

    def metrics(self, role: str) -> str:
        """Where the first process of a role has its metrics."""
        return str(next(process["metrics"] for process in self.processes if process["role"] == role))


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Running]:
    state = folder / "state.json"
    with running(*UP, "--state", str(state)) as command:
        address = command.wait_ready()
        yield Running(address, json.loads(state.read_text())["processes"])
        command.stop()


class Prometheus:
    """A running one."""

    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Its results. Raises HTTPError: it is no PromQL."""
        parameters = urllib.parse.urlencode({"query": expression})
        answer = json.loads(get(f"{self._url}/api/v1/query?{parameters}"))
        assert answer["status"] == "success"
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def is_up(self) -> bool:
        try:
            return get(f"{self._url}/-/ready") != b""
        except OSError:
            return False


@contextlib.contextmanager
def running_prometheus(cluster: Running, folder: Path) -> Iterator[Prometheus]:
    """Scrapes every process under the labels that a pod has."""
    targets = [
        {
            "targets": [process["metrics"]],
            "labels": {"namespace": "testing", "pod": f"{process['role']}-{process['index']}"},
        }
        for process in cluster.processes
    ]
    config = {
        "global": {"scrape_interval": SCRAPE_INTERVAL, "scrape_timeout": SCRAPE_INTERVAL},
        "scrape_configs": [{"job_name": "grokmoe", "static_configs": targets}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    listen = f"127.0.0.1:{free_port('127.0.0.1')}"
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={listen}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        prometheus = Prometheus(f"http://{listen}")
        try:
            deadline = time.monotonic() + START_TIMEOUT
            while not prometheus.is_up():
                assert process.poll() is None, (folder / "prometheus.log").read_text()
                assert time.monotonic() < deadline, "Prometheus does not start"
                time.sleep(0.1)
            yield prometheus
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        content: bytes = answer.read()
        return content
