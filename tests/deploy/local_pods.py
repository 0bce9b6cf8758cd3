"""Rendered pods as processes of this machine, each with an address of its own on loopback: ports stay as they are.

What a cluster does is done here by the objects' own words: pods from workloads, addresses from Services' selectors,
files from ConfigMaps and volumes, init containers before containers, probes on the probes' ports.
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.deploy.rendered import GROUP_LABEL, IMAGE_PACKAGES, ROOT, Object, group_sets, matches, of_kind

IMAGE_FOLDERS = {"/opt/grokmoe/demo_model": str(ROOT / "launcher" / "demo_model")}
"""Folder of the image -> what is copied there (deploy/Dockerfile)."""

IMAGE_ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "PYTHONPATH": os.pathsep.join((str(IMAGE_PACKAGES), str(ROOT))),
    "PYTHONUNBUFFERED": "1",
}
"""What the image sets, and nothing of ours: a pod does not have it either."""


class Pod:
    """One pod. `processes` are its running containers by name."""

    def __init__(
        self, owner: str, name: str, labels: Mapping[str, str], spec: Object, address: str, folder: Path
    ) -> None:
        self.owner, self.name, self.labels, self.spec, self.address = owner, name, labels, spec, address
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.said: dict[str, list[str]] = {}

    def container(self, name: str) -> Object:
        """The specification of one of its containers."""
        found: Object = next(one for one in self.spec["containers"] if one["name"] == name)
        return found


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Objects, and what they become. `secrets`: name -> key -> path of a file."""

    objects: list[Object]
    folder: Path
    secrets: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    pods: list[Pod] = dataclasses.field(default_factory=list)

    def create(self) -> None:
        """Makes the pods of all workloads; nothing runs yet."""
        # Of 127.0.0.0/8, drawn: what else runs on this machine has others.
        net = f"127.{random.randint(16, 250)}.{random.randint(0, 250)}"
        host = iter(range(1, 255))
        for each in of_kind(self.objects, "Deployment", "StatefulSet"):
            template = each["spec"]["template"]
            for index in range(each["spec"]["replicas"]):
                labels = dict(template["metadata"]["labels"])
                if each["kind"] == "StatefulSet":
                    labels["apps.kubernetes.io/pod-index"] = str(index)
                name = f"{each['metadata']['name']}-{index}"
                self._add(each["metadata"]["name"], name, labels, template["spec"], f"{net}.{next(host)}")
        for each in of_kind(self.objects, "LeaderWorkerSet"):
            self._add_groups(each, lambda: f"{net}.{next(host)}")
        for each in of_kind(self.objects, "Pod"):
            name = each["metadata"]["name"]
            self._add(name, name, each["metadata"]["labels"], each["spec"], f"{net}.{next(host)}")

    def _add_groups(self, each: Object, new_address: Callable[[], str]) -> None:
        """As their controller does: a leader of each group, the others of it, and what all are told."""
        leaders, followers = group_sets(each)
        for group in range(leaders["spec"]["replicas"]):
            leader = f"{each['metadata']['name']}-{group}"
            address = new_address()
            for index in range(followers["spec"]["replicas"] + 1):
                template = (followers if index else leaders)["spec"]["template"]
                labels = template["metadata"]["labels"] | {f"{GROUP_LABEL}worker-index": str(index)}
                told = [
                    {"name": "LWS_LEADER_ADDRESS", "value": address},
                    {"name": "LWS_WORKER_INDEX", "value": str(index)},
                ]
                containers = [one | {"env": [*told, *one.get("env", ())]} for one in template["spec"]["containers"]]
                name, own = (f"{leader}-{index}", new_address()) if index else (leader, address)
                self._add(leader, name, labels, {**template["spec"], "containers": containers}, own)

    def _add(self, owner: str, name: str, labels: Mapping[str, str], spec: Object, address: str) -> None:
        folder = self.folder / str(len(self.pods))  # short: there are Unix sockets in it
        folder.mkdir()
        self.pods.append(Pod(owner, name, labels, spec, address, folder))

    def of(self, component: str) -> list[Pod]:
        """The pods of a component."""
        return [pod for pod in self.pods if pod.labels["app.kubernetes.io/component"] == component]

    def start(self, pod: Pod) -> None:
        """Runs the init containers one after another, then starts the containers."""
        for container in pod.spec.get("initContainers", ()):
            done = self._spawn(pod, container)
            assert done.wait(60) == 0, pod.said[container["name"]]
        for container in pod.spec["containers"]:
            pod.processes[container["name"]] = self._spawn(pod, container)

    def _spawn(self, pod: Pod, container: Object) -> subprocess.Popen[str]:
        folders = self._mounted(pod, container)
        variables = self._variables(pod, container)
        expanded = [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], one) for one in container["args"]]
        arguments = [self._local(argument, pod, folders) for argument in expanded]
        process = subprocess.Popen(
            [sys.executable, "-m", "grokmoe_image", *arguments],
            env=IMAGE_ENVIRONMENT | {"HOME": folders["/tmp"]} | variables,
            cwd=folders["/tmp"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = pod.said[container["name"]] = []
        assert process.stdout is not None
        reader = threading.Thread(target=_read, args=(process, said), daemon=True)
        reader.start()
        process.reader = reader  # type: ignore[attr-defined]
        return process

    def _variables(self, pod: Pod, container: Object) -> dict[str, str]:
        found = {}
        for variable in container.get("env", ()):
            if "value" in variable:
                found[variable["name"]] = variable["value"]
            else:
                label = re.fullmatch(r"metadata\.labels\['(.+)'\]", variable["valueFrom"]["fieldRef"]["fieldPath"])
                assert label is not None
                found[variable["name"]] = pod.labels[label[1]]
        return found

    def _mounted(self, pod: Pod, container: Object) -> dict[str, str]:
        """Path in the container -> folder here."""
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        return {one["mountPath"]: str(self._volume(pod, volumes[one["name"]])) for one in container["volumeMounts"]}

    def _volume(self, pod: Pod, volume: Object) -> Path:
        """A folder of this pod, filled as the volume says; made once."""
        folder = pod.folder / volume["name"]
        if folder.exists():
            return folder
        folder.mkdir()
        if "configMap" in volume:
            maps = {each["metadata"]["name"]: each["data"] for each in of_kind(self.objects, "ConfigMap")}
            for key, text in maps[volume["configMap"]["name"]].items():
                (folder / key).write_text(text)
        elif "secret" in volume:
            keys = self.secrets[volume["secret"]["secretName"]]
            items = volume["secret"].get("items") or [{"key": key, "path": key} for key in keys]
            for item in items:
                (folder / item["path"]).write_bytes(Path(keys[item["key"]]).read_bytes())
        else:
            assert "emptyDir" in volume, volume
        return folder

    def _local(self, argument: str, pod: Pod, folders: Mapping[str, str]) -> str:
        """An argument with the pod's paths and the cluster's names as they are on this machine."""
        for inside, here in {**IMAGE_FOLDERS, **folders}.items():
            argument = re.sub(rf"(?<=[=:]){re.escape(inside)}(?=/|$)", here, argument)
        argument = argument.replace("0.0.0.0", pod.address)
        argument = re.sub(r"dns:///([a-z0-9-]+):(\d+)", lambda found: self._headless(found[1], int(found[2])), argument)
        flag, _, value = argument.partition("=")
        if flag == "--any":
            addresses = {one.name: one.address for one in self.pods}
            return "--any=" + ",".join(addresses[name.partition(".")[0]] for name in value.split(","))
        if flag == "--address":
            name, _, port = value.partition(":")
            return f"--address={self.service(name, int(port))}"
        return argument

    def _selected(self, name: str) -> tuple[Object, list[Pod]]:
        service = next(each for each in of_kind(self.objects, "Service") if each["metadata"]["name"] == name)
        return service, [pod for pod in self.pods if matches(service["spec"]["selector"], pod.labels)]

    def _headless(self, name: str, port: int) -> str:
        """What DNS makes of a headless Service: its pods' addresses, and the port as it was asked for."""
        service, pods = self._selected(name)
        assert service["spec"]["clusterIP"] == "None"
        return ",".join(f"{pod.address}:{port}" for pod in pods)

    def service(self, name: str, port: int) -> str:
        """An address behind a Service: the port is translated to the container's."""
        service, pods = self._selected(name)
        (mapping,) = [one for one in service["spec"]["ports"] if one["port"] == port]
        (number,) = [
            one["containerPort"]
            for container in pods[0].spec["containers"]
            for one in container["ports"]
            if one["name"] == mapping["targetPort"]
        ]
        return ",".join(f"{pod.address}:{number}" for pod in pods)

    def probe(self, pod: Pod, container: str, kind: str) -> bool:
        """Asks once, as the kubelet would. kind: such as `readinessProbe`."""
        probe = pod.container(container)[kind]
        if "httpGet" in probe:
            return _answers(f"http://{pod.address}:{self._port(pod, container, probe['httpGet']['port'])}", probe)
        with grpc.insecure_channel(f"{pod.address}:{probe['grpc']['port']}") as channel:
            request = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=probe["timeoutSeconds"])
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def _port(self, pod: Pod, container: str, name: str) -> int:
        (number,) = [one["containerPort"] for one in pod.container(container)["ports"] if one["name"] == name]
        return int(number)

    def wait_started(self, pod: Pod, timeout: float = 120.0) -> None:
        """Returns when the startup probes of all containers have succeeded; fails when one ends before."""
        self.wait(pod, "startupProbe", True, timeout)

    def wait(self, pod: Pod, kind: str, wanted: bool, timeout: float = 60.0) -> None:
        """Returns when a probe says what is wanted of every container."""
        deadline = time.monotonic() + timeout
        for name, process in pod.processes.items():
            while self.probe(pod, name, kind) is not wanted:
                assert process.poll() is None, f"{pod.name} {name} ended:\n" + "\n".join(pod.said[name][-20:])
                assert time.monotonic() < deadline, f"{pod.name} {name}:\n" + "\n".join(pod.said[name][-20:])
                time.sleep(0.1)

    def delete(self, pod: Pod) -> dict[str, int]:
        """SIGTERM to all containers, and their exit codes. They have the time that the pod gives them."""
        for process in pod.processes.values():
            process.send_signal(signal.SIGTERM)
        codes = {
            name: _wait(process, pod.spec["terminationGracePeriodSeconds"]) for name, process in pod.processes.items()
        }
        pod.processes = {}
        return codes

    def lose(self, pod: Pod) -> None:
        """All containers are gone at once, as with their node."""
        for process in pod.processes.values():
            process.kill()
        for process in pod.processes.values():
            _wait(process, 30)
        pod.processes = {}

    def kill(self) -> None:
        """Ends what a failed test left."""
        for pod in self.pods:
            for process in pod.processes.values():
                process.kill()
                _wait(process, 30)


def _answers(url: str, probe: Object) -> bool:
    try:
        with urllib.request.urlopen(url + probe["httpGet"]["path"], timeout=probe["timeoutSeconds"]) as answer:
            return 200 <= int(answer.status) < 400
    except OSError:
        return False


def _read(process: subprocess.Popen[str], said: list[str]) -> None:
    assert process.stdout is not None
    with process.stdout as stream:
        for line in stream:
            said.append(line.rstrip("\n"))


def _wait(process: subprocess.Popen[str], timeout: float) -> int:
    code = process.wait(timeout)
    process.reader.join(timeout)  # type: ignore[attr-defined]
    return code
