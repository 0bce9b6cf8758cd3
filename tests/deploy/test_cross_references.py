"""What one object says of another is true: selectors, ports, probes, volumes, budgets, policies, targets."""

from __future__ import annotations

import re

import pytest

from attention_worker.config import parse_layers
from tests.deploy.rendered import (
    CASES,
    Object,
    containers,
    matches,
    objects,
    of_kind,
    pod_templates,
    title,
)

WORKLOADS = ("Deployment", "StatefulSet")

MADE_ELSEWHERE = {
    "everything": {"weights"},
    "grok1-8xh100": {"grok-1"},
    "grok1-cells": {"grok-1"},
    "grok1-8xh100-fp8": {"grok-1"},
    "grok1-8xh200": {"grok-1"},
    "grok1-mixed": {"grok-1"},
    "high-availability": {"grok-1"},
}
"""Claims that a case names as existing."""


def workloads(case: str) -> list[Object]:
    return of_kind(objects(case), *WORKLOADS)


def roles(case: str) -> list[Object]:
    """Workloads that speak gRPC: all but the gateway."""
    return [each for each in workloads(case) if each["metadata"]["labels"]["app.kubernetes.io/component"] != "openai"]


def pod_labels(workload: Object) -> dict[str, str]:
    """As the controller makes them: a StatefulSet's pods have their ordinal, here of the first."""
    labels = dict(workload["spec"]["template"]["metadata"]["labels"])
    if workload["kind"] == "StatefulSet":
        labels["apps.kubernetes.io/pod-index"] = "0"
    return labels


def selected(case: str, selector: Object) -> list[Object]:
    return [each for each in workloads(case) if matches(selector, pod_labels(each))]


def ports_of(workload: Object) -> dict[str, int]:
    """Port name -> number; of several containers the first that has the name."""
    found: dict[str, int] = {}
    for container in workload["spec"]["template"]["spec"]["containers"]:
        for port in container.get("ports", ()):
            found.setdefault(port["name"], port["containerPort"])
    return found


def numbers_of(workload: Object) -> set[int]:
    spec = workload["spec"]["template"]["spec"]
    return {port["containerPort"] for container in spec["containers"] for port in container["ports"]}


@pytest.mark.parametrize("case", CASES)
def test_a_workload_selects_its_own_pods_and_no_others(case: str) -> None:
    for each in workloads(case):
        assert selected(case, each["spec"]["selector"]) == [each]


@pytest.mark.parametrize("case", CASES)
def test_services_select_pods_that_have_their_ports(case: str) -> None:
    for service in of_kind(objects(case), "Service"):
        found = selected(case, service["spec"]["selector"])
        assert found, title(service)
        for port in service["spec"]["ports"]:
            for each in found:
                target = port["targetPort"]
                assert target in ports_of(each) if isinstance(target, str) else target in numbers_of(each)
                if (
                    service["spec"].get("clusterIP") == "None"
                ):  # DNS gives the pod's address: nobody translates the port
                    number = ports_of(each)[target] if isinstance(target, str) else target
                    assert port["port"] == number


@pytest.mark.parametrize("case", CASES)
def test_statefulsets_name_a_headless_service_of_their_pods(case: str) -> None:
    services = {each["metadata"]["name"]: each for each in of_kind(objects(case), "Service")}
    for each in of_kind(objects(case), "StatefulSet"):
        service = services[each["spec"]["serviceName"]]
        assert service["spec"]["clusterIP"] == "None"
        assert matches(service["spec"]["selector"], pod_labels(each))


@pytest.mark.parametrize("case", CASES)
def test_a_router_names_every_pod_of_its_pipelines_once(case: str) -> None:
    """Each pipeline has a pod of every stage, and its stages have every layer of the model, in this order."""
    sets = {each["metadata"]["name"]: each for each in of_kind(objects(case), "StatefulSet")}
    for each, _, container in containers(objects(case)):
        if container["name"] != "router":
            continue
        (given,) = (one.partition("=")[2] for one in container["args"] if one.startswith("--attention="))
        if "+" not in given:
            assert not any("--layers" in one for _, _, other in containers(objects(case)) for one in other["args"])
            continue
        named: list[str] = []
        for pipeline in given.split(","):
            layers: list[int] = []
            for address in pipeline.split("+"):
                host, _, port = address.partition(":")
                pod, _, service = host.partition(".")
                name, _, ordinal = pod.rpartition("-")
                stage, labels = sets[name], sets[name]["metadata"]["labels"]
                assert stage["spec"]["serviceName"] == service
                assert int(ordinal) < stage["spec"]["replicas"]
                assert ports_of(stage)["grpc"] == int(port)
                assert labels["grokmoe/cell"] == each["metadata"]["labels"]["grokmoe/cell"]
                args = stage["spec"]["template"]["spec"]["containers"][0]["args"]
                (spec,) = (one.partition("=")[2] for one in args if one.startswith("--layers="))
                layers += parse_layers(spec, 4)
                named.append(pod)
            assert layers == list(range(4))
        assert len(set(named)) == len(named)
        cell = each["metadata"]["labels"]["grokmoe/cell"]
        pods = [
            f"{name}-{ordinal}"
            for name, one in sets.items()
            if one["metadata"]["labels"].get("grokmoe/cell") == cell
            for ordinal in range(one["spec"]["replicas"])
        ]
        assert sorted(pods) == sorted(named)


@pytest.mark.parametrize("case", CASES)
def test_a_router_finds_exactly_its_workers(case: str) -> None:
    services = {each["metadata"]["name"]: each for each in of_kind(objects(case), "Service")}
    for each, _, container in containers(objects(case)):
        if container["name"] != "router":
            continue
        named = dict(argument[2:].split("=", 1) for argument in container["args"][1:] if "=dns:///" in argument)
        for flag, component in (("attention", "attention"), ("experts", "expert")):
            if flag not in named:
                continue  # beside it, on a socket
            name, _, port = named[flag].removeprefix("dns:///").partition(":")
            found = selected(case, services[name]["spec"]["selector"])
            assert {one["metadata"]["labels"]["app.kubernetes.io/component"] for one in found} == {component}
            assert all(ports_of(one)["grpc"] == int(port) for one in found)
            if component == "attention":  # its KV pages are one router's
                cells = {one["metadata"]["labels"]["grokmoe/cell"] for one in found}
                assert cells == {each["metadata"]["labels"]["grokmoe/cell"]}
            else:
                assert len(found) == len([one for one in workloads(case) if "-experts-" in one["metadata"]["name"]])


@pytest.mark.parametrize("case", CASES)
def test_probes_ask_the_health_port_for_services_that_exist(case: str) -> None:
    ready = {
        "router": "grokmoe.v1.Generation",
        "attention": "grokmoe.v1.Attention",
        "expert": "grokmoe.v1.Expert",
    }
    for each in roles(case):
        spec = each["spec"]["template"]["spec"]
        for container in spec["containers"]:
            health = next(port["containerPort"] for port in container["ports"] if port["name"] == "health")
            listen = next(one for one in container["args"] if one.startswith("--health-listen="))
            assert int(listen.rpartition(":")[2]) == health
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                assert container[probe]["grpc"]["port"] == health
                assert container[probe]["timeoutSeconds"] >= 5, "one second kills pods that compute"
            # The life of a process must not depend on its peers: only "" is asked, which is true while it runs.
            assert container["livenessProbe"]["grpc"]["service"] == ""
            assert container["readinessProbe"]["grpc"]["service"] == ready[container["name"]]
            start = container["startupProbe"]
            assert start["grpc"]["service"] == ("" if container["name"] == "router" else ready[container["name"]])
            assert start["periodSeconds"] * start["failureThreshold"] >= 600


@pytest.mark.parametrize("case", CASES)
def test_ports_of_one_pod_differ_and_are_listened_on(case: str) -> None:
    for each in roles(case):
        spec = each["spec"]["template"]["spec"]
        numbers = [port["containerPort"] for container in spec["containers"] for port in container["ports"]]
        assert len(numbers) == len(set(numbers)), title(each)
        for container in spec["containers"]:
            given = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert f"--metrics-port={given['metrics']}" in container["args"]
            listen = next(one for one in container["args"] if one.startswith("--listen="))
            if "grpc" in given:
                assert int(listen.rpartition(":")[2]) == given["grpc"]
            else:
                assert listen.startswith("--listen=unix:/")


@pytest.mark.parametrize("case", CASES)
def test_pods_have_time_to_end(case: str) -> None:
    for each in workloads(case):
        spec = each["spec"]["template"]["spec"]
        for container in spec["containers"]:
            grace = float(next(one for one in container["args"] if one.startswith("--grace=")).partition("=")[2])
            drain = container["lifecycle"]["preStop"]["sleep"]["seconds"]
            assert drain + grace < spec["terminationGracePeriodSeconds"], title(each)


@pytest.mark.parametrize("case", CASES)
def test_mounts_have_volumes_and_volumes_are_mounted(case: str) -> None:
    for each, template in pod_templates(objects(case)):
        spec = template["spec"]
        everyone = [*spec.get("initContainers", ()), *spec["containers"]]
        mounted = {mount["name"] for container in everyone for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}, title(each)
        for container in everyone:
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(paths) == len(set(paths))
            # What an argument names is in a volume, or in the image.
            for argument in container["args"]:
                for path in re.findall(r"(?:=|:)(/[\w./-]+)", argument.replace("://", "")):
                    inside = any(path.startswith(mount + "/") or path == mount for mount in paths)
                    assert inside or path.startswith("/opt/grokmoe/"), (title(each), argument)


@pytest.mark.parametrize("case", CASES)
def test_config_maps_claims_and_accounts_exist(case: str) -> None:
    found = objects(case)
    names = {(each["kind"], each["metadata"]["name"]) for each in found}
    keys = {each["metadata"]["name"]: set(each.get("data", ())) for each in of_kind(found, "ConfigMap")}
    for each, template in pod_templates(found):
        assert ("ServiceAccount", template["spec"]["serviceAccountName"]) in names, title(each)
        for volume in template["spec"]["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in names or claim in MADE_ELSEWHERE[case]
        for container in template["spec"]["containers"]:
            for argument in container["args"]:
                if argument.startswith("--experts-of="):
                    folder, _, key = argument.partition("=")[2].rpartition("/")
                    volume_name = next(one["name"] for one in container["volumeMounts"] if one["mountPath"] == folder)
                    volume = next(one for one in template["spec"]["volumes"] if one["name"] == volume_name)
                    assert key in keys[volume["configMap"]["name"]]


@pytest.mark.parametrize("case", ["everything", "high-availability"])
def test_certificates_are_those_that_pods_mount_and_routers_ask_for(case: str) -> None:
    found = objects(case)
    certificates = {each["spec"]["secretName"]: each for each in of_kind(found, "Certificate")}
    mounted = {
        volume["secret"]["secretName"]
        for _, template in pod_templates(found)
        for volume in template["spec"]["volumes"]
        if "secret" in volume and "tls" in volume["name"]
    }
    assert mounted == set(certificates)
    router = next(container for _, _, container in containers(found) if container["name"] == "router")
    asked = next(one for one in router["args"] if one.startswith("--worker-tls-server-name=")).partition("=")[2]
    servers = [each for each in certificates.values() if asked in each["spec"]["dnsNames"]]
    assert [each["spec"]["usages"] for each in servers] == [["server auth"]]
    # The authority of workers must not be the one of clients (docs/security.md).
    issuers = {name: each["spec"]["issuerRef"]["name"] for name, each in certificates.items()}
    assert issuers["demo-grokmoe-clients-tls"] not in {
        issuers["demo-grokmoe-workers-tls"],
        issuers["demo-grokmoe-workers-client-tls"],
    }


@pytest.mark.parametrize("case", CASES)
def test_every_pod_has_one_budget(case: str) -> None:
    """More than one budget for a pod and nothing can be evicted at all."""
    for each in workloads(case):
        copies = range(each["spec"].get("replicas", 1))
        for ordinal in copies if each["kind"] == "StatefulSet" else [0]:
            labels = pod_labels(each) | {"apps.kubernetes.io/pod-index": str(ordinal)}
            budgets = [
                one for one in of_kind(objects(case), "PodDisruptionBudget") if matches(one["spec"]["selector"], labels)
            ]
            assert len(budgets) == 1, (title(each), ordinal)


@pytest.mark.parametrize("case", CASES)
def test_only_routers_reach_workers(case: str) -> None:
    found = objects(case)
    policies = of_kind(found, "NetworkPolicy")
    for each in roles(case):
        mine = [one for one in policies if matches(one["spec"]["podSelector"], pod_labels(each))]
        mine = [one for one in mine if not one["metadata"]["name"].endswith("-pairs")]  # test_ends_of_a_pair_may_meet
        assert len(mine) == 1
        spec = mine[0]["spec"]
        component = each["metadata"]["labels"]["app.kubernetes.io/component"]
        if component == "router":
            open_ports = {port["port"] for rule in spec["egress"] for port in rule["ports"]}
            assert open_ports <= {53, 50052, 50053, *([4317] if "tracing" in CASES[case] else [])}
            for rule in spec["egress"]:
                for peer in rule.get("to", ()):
                    if rule["ports"][0]["port"] == 4317:
                        continue
                    workers = selected(case, peer["podSelector"])
                    assert workers
                    number = rule["ports"][0]["port"]
                    assert all(ports_of(one)["grpc"] == number for one in workers)
            continue
        collector = next((one for one in CASES[case].get("tracing", {}).get("collector", ())), None)
        assert [rule.get("to") for rule in spec["egress"][1:]] == ([[collector]] if collector else []), "nobody else"
        calls = [rule for rule in spec["ingress"] if rule["ports"][0]["port"] == ports_of(each)["grpc"]]
        (peer,) = calls[0]["from"]
        assert len(calls) == 1
        routers = selected(case, peer["podSelector"])
        assert {one["metadata"]["labels"]["app.kubernetes.io/component"] for one in routers} == {"router"}
        assert {port["port"] for rule in spec["ingress"] for port in rule["ports"]} == {
            ports_of(each)["grpc"],
            ports_of(each)["metrics"],
        }


def test_ends_of_a_pair_may_meet() -> None:
    found = objects("pairs")
    router = next(container for _, _, container in containers(found) if container["name"] == "router")
    assert "--pair-host=$(POD_IP)" in router["args"]
    assert [one["name"] for one in router["env"]] == ["POD_IP", "GLOO_SOCKET_IFNAME"]
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(found, "NetworkPolicy")}
    for own, other in (("router", "expert"), ("expert", "router")):
        spec = policies[f"demo-grokmoe-{own}-pairs"]
        for rules, side in ((spec["ingress"], "from"), (spec["egress"], "to")):
            assert [sorted(rule) for rule in rules] == [[side]], "every port"
            peers = selected("pairs", rules[0][side][0]["podSelector"])
            assert {each["metadata"]["labels"]["app.kubernetes.io/component"] for each in peers} == {other}


GATED = [case for case in CASES if CASES[case].get("gateway", {}).get("openai", {}).get("enabled")]


@pytest.mark.parametrize("case", GATED)
def test_the_gateway_finds_routers_and_nobody_but_them(case: str) -> None:
    found = objects(case)
    (gateway,) = [each for each in workloads(case) if each not in roles(case)]
    (container,) = gateway["spec"]["template"]["spec"]["containers"]
    server = next(one for one in container["args"] if one.startswith("--server=dns:///")).removeprefix(
        "--server=dns:///"
    )
    name, _, port = server.partition(":")
    service = next(each for each in of_kind(found, "Service") if each["metadata"]["name"] == name)
    assert service["spec"]["clusterIP"] == "None"
    routers = selected(case, service["spec"]["selector"])
    assert {each["metadata"]["labels"]["app.kubernetes.io/component"] for each in routers} == {"router"}
    assert all(ports_of(each)["grpc"] == int(port) for each in routers)
    assert len(routers) == (CASES[case]["cells"]["count"] if CASES[case]["cells"]["shape"] == "split" else 1)
    given = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert {f"--port={given['http']}", f"--metrics-port={given['metrics']}"} <= set(container["args"])
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == "http"
    # Alive is the process, whether or not there is a router.
    assert container["livenessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/liveness"
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(found, "NetworkPolicy")}
    allowed = [peer for rule in policies["demo-grokmoe-openai"]["egress"][:2] for peer in rule.get("to", ())]
    assert [selected(case, peer["podSelector"]) for peer in allowed] == [routers]
    callers = policies["demo-grokmoe-router"]["ingress"][0].get("from")
    assert callers is None or any(
        selected(case, peer.get("podSelector", {"no": "one"})) == [gateway] for peer in callers
    )


@pytest.mark.parametrize("case", ["everything"])
def test_every_role_says_where_its_spans_go_and_may(case: str) -> None:
    url = CASES[case]["tracing"]["url"]
    for each in workloads(case):
        for container in each["spec"]["template"]["spec"]["containers"]:
            assert f"--traces={url}" in container["args"], title(each)
            shares = [one for one in container["args"] if one.startswith("--trace-share=")]
            assert shares == (["--trace-share=0.1"] if container["name"] == "router" else [])
    for policy in of_kind(objects(case), "NetworkPolicy"):
        ports = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
        assert {53, 4317} <= ports, title(policy)


@pytest.mark.parametrize("case", CASES)
def test_autoscalers_name_workloads_that_leave_their_number_to_them(case: str) -> None:
    scalers = of_kind(objects(case), "ScaledObject", "HorizontalPodAutoscaler")
    targets = {(one["spec"]["scaleTargetRef"]["kind"], one["spec"]["scaleTargetRef"]["name"]) for one in scalers}
    by_name = {(each["kind"], each["metadata"]["name"]): each for each in workloads(case)}
    assert targets <= set(by_name)
    for key, each in by_name.items():
        assert ("replicas" in each["spec"]) == (key not in targets), "a count in the chart undoes the autoscaler's"


def test_two_routers_never_want_the_same_attention_workers() -> None:
    """Their KV pages are leased to one: a second router must wait for the first to be gone."""
    for each in of_kind(objects("two-cells"), "Deployment"):
        assert each["spec"]["replicas"] == 1
        assert each["spec"]["strategy"] == {"type": "Recreate"}
    (cell,) = of_kind(objects("high-availability"), "Deployment")
    assert cell["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert [one["name"] for one in cell["spec"]["template"]["spec"]["containers"]] == ["router", "attention"]
    sockets = [
        one
        for container in cell["spec"]["template"]["spec"]["containers"]
        for one in container["args"]
        if "unix:" in one
    ]
    assert sorted(sockets) == [
        "--attention=unix:/run/grokmoe/attention.sock",
        "--listen=unix:/run/grokmoe/attention.sock",
    ]


@pytest.mark.parametrize("case", CASES)
def test_gpus_are_where_the_device_is(case: str) -> None:
    for _, _, container in containers(objects(case)):
        device = next((one.partition("=")[2] for one in container["args"] if one.startswith("--device=")), "cpu")
        last = [one.partition("=")[2] for one in container["args"] if one.startswith("--device=")][-1:] or [device]
        has_gpu = "nvidia.com/gpu" in container["resources"].get("limits", {})
        if case != "everything" or container["name"] != "attention":
            assert has_gpu == last[0].startswith("cuda")
        if has_gpu and case in ("grok1-8xh100", "grok1-8xh200", "grok1-mixed"):
            assert container["image"].endswith("-cuda")


def test_a_checkpoint_that_is_fetched_is_waited_for_by_all_that_read_it() -> None:
    found = objects("download")
    (job,) = of_kind(found, "Job")
    fetch = job["spec"]["template"]["spec"]["containers"][0]["args"]
    folder = next(one for one in fetch if one.startswith("--folder="))
    for each in of_kind(found, *WORKLOADS):
        spec = each["spec"]["template"]["spec"]
        wait = spec["initContainers"][0]["args"]
        assert wait[0] == "await-weights"
        assert folder in wait, "looked for where it is put"
        model = next(one for one in spec["containers"][0]["args"] if one.startswith("--model="))
        assert model.partition("=")[2] == folder.partition("=")[2]
        assert all(one["readOnly"] for one in spec["containers"][0]["volumeMounts"] if one["name"] == "model")
