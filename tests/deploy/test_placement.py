"""Every expert of every layer has a host, and what hosts the same is kept apart."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict

import helm_python
import pytest
from grokmoe_image.placement import experts_of, with_experts
from grokmoe_image.usage import UsageError
from hypothesis import given, settings
from hypothesis import strategies as st

from grokmoe.expert_spec import parse_experts
from tests.deploy.rendered import (
    BOUND,
    CASES,
    VARIANTS,
    Object,
    containers,
    matches,
    objects,
    objects_of,
    of_kind,
    profile,
)

Cell = tuple[int, int]
"""(layer, expert)."""


def sizes(case: str) -> tuple[int, int]:
    """Experts and layers of a case's model."""
    model = {"numExperts": 8, "numLayers": 4} | CASES[case].get("model", {})
    return model["numExperts"], model["numLayers"]


def held_by_pod(found: list[Object], num_experts: int, num_layers: int) -> dict[str, set[Cell]]:
    """DNS name of each expert pod -> what it holds, read as the worker reads it."""
    maps = {each["metadata"]["name"]: each.get("data", {}) for each in of_kind(found, "ConfigMap")}
    held = {}
    for each in of_kind(found, "StatefulSet"):
        volumes = {one["name"]: one for one in each["spec"]["template"]["spec"]["volumes"]}
        if "experts" not in volumes:
            continue
        placement = json.loads(maps[volumes["experts"]["configMap"]["name"]]["experts.json"])
        assert each["spec"]["replicas"] == len(placement), "an ordinal without an entry, or an entry without a pod"
        for ordinal, spec in enumerate(placement):
            cells = parse_experts(spec, num_experts, num_layers)
            name = f"{each['metadata']['name']}-{ordinal}.{each['spec']['serviceName']}"
            held[name] = {(layer, expert) for layer, experts in cells.items() for expert in experts}
    return held


def awaited(found: list[Object]) -> list[set[str]]:
    """The groups of names that a router waits for."""
    args = next(one["args"] for _, _, one in containers(found) if one["name"] == "await-experts")
    return [set(one.removeprefix("--any=").split(",")) for one in args[1:]]


@pytest.mark.parametrize("case", CASES)
def test_every_expert_of_every_layer_has_a_host(case: str) -> None:
    num_experts, num_layers = sizes(case)
    held = held_by_pod(objects(case), num_experts, num_layers)
    everything = set(itertools.product(range(num_layers), range(num_experts)))
    assert set().union(*held.values()) == everything


@pytest.mark.parametrize("case", CASES)
def test_a_router_waits_for_a_holder_of_everything_and_not_for_more(case: str) -> None:
    num_experts, num_layers = sizes(case)
    held = held_by_pod(objects(case), num_experts, num_layers)
    holders: defaultdict[Cell, set[str]] = defaultdict(set)
    for name, cells in held.items():
        for cell in cells:
            holders[cell].add(name)
    groups = awaited(objects(case))
    assert {frozenset(group) for group in groups} == {frozenset(names) for names in holders.values()}


@pytest.mark.parametrize("case", ["high-availability", "laptop"])
def test_any_one_expert_pod_may_be_lost(case: str) -> None:
    num_experts, num_layers = sizes(case)
    held = held_by_pod(objects(case), num_experts, num_layers)
    everything = set(itertools.product(range(num_layers), range(num_experts)))
    for lost in held:
        assert set().union(*(cells for name, cells in held.items() if name != lost)) == everything
    assert all(len(group) == 2 for group in awaited(objects(case)))


def test_copies_of_an_expert_are_kept_apart_and_evicted_one_at_a_time() -> None:
    """Equal ordinals hold the same: an affinity with their own ordinal, and a budget for each ordinal."""
    found = objects("high-availability")
    sets = [each for each in of_kind(found, "StatefulSet") if "-experts-" in each["metadata"]["name"]]
    assert len(sets) == 2
    for each in sets:
        (term,) = each["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert term["matchLabelKeys"] == ["apps.kubernetes.io/pod-index"]
        for other in sets:
            assert matches(term["labelSelector"], other["spec"]["template"]["metadata"]["labels"])
    budgets = [one for one in of_kind(found, "PodDisruptionBudget") if "-experts-" in one["metadata"]["name"]]
    assert len(budgets) == 8
    for ordinal, budget in enumerate(budgets):
        assert budget["spec"]["minAvailable"] == 1
        selected = [
            (each["metadata"]["name"], index)
            for each in sets
            for index in range(each["spec"]["replicas"])
            if matches(
                budget["spec"]["selector"],
                each["spec"]["template"]["metadata"]["labels"] | {"apps.kubernetes.io/pod-index": str(index)},
            )
        ]
        assert selected == [(each["metadata"]["name"], ordinal) for each in sets]


@pytest.mark.parametrize("updated", [0, 1, 2, 16])
def test_an_upgrade_takes_the_copies_one_after_another(updated: int) -> None:
    """Both sets at once would restart the holders of one expert at the same time: budgets do not count there."""
    values = profile("high-availability")
    values["experts"]["updatedCopies"] = updated
    sets = [each for each in of_kind(objects_of(values), "StatefulSet") if "-experts-" in each["metadata"]["name"]]
    rolling = [each["spec"]["updateStrategy"]["type"] == "RollingUpdate" for each in sets]
    assert rolling == [copy < updated for copy in range(2)]


def pools(*pods: str) -> Object:
    return {"experts": {"pools": [{"name": "p", "pods": list(pods), "device": "cpu", "resources": BOUND}]}}


@pytest.mark.parametrize(
    ("pods", "words"),
    [
        (["0-3", "4-6"], "experts"),  # the schema's: nobody names expert 7
        (["0-7@0-2"], "nobody holds expert 0 in layer 3"),
        (["0-6+7@0-1,3"], "nobody holds expert 7 in layer 2"),
        (["all", "8"], "names expert 8, the model has 8"),
        (["all", "0@4"], "names layer 4, the model has 4"),
        (["all", "3-1"], "is empty"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(pods: list[str], words: str) -> None:
    with pytest.raises(helm_python.HelmError, match=words):
        objects_of(pools(*pods))


_number = st.integers(0, 7).map(str)
_range = st.tuples(st.integers(0, 7), st.integers(0, 7)).map(lambda ends: f"{min(ends)}-{max(ends)}")
_layer = st.integers(0, 3).map(str) | st.sampled_from(["0-1", "2-3", "1-3"])
_experts = st.lists(_number | _range, min_size=1, max_size=3).map(",".join) | st.just("all")
_layers = st.lists(_layer, min_size=1, max_size=2).map(",".join) | st.just("all")
_group = st.tuples(_experts, st.none() | _layers).map(lambda group: group[0] if group[1] is None else "@".join(group))
_specs = st.lists(st.lists(_group, min_size=1, max_size=3).map("+".join), min_size=1, max_size=4)


@given(_specs)
@settings(max_examples=60)
def test_chart_and_worker_read_placements_alike(specs: list[str]) -> None:
    """Whatever the words: the chart renders exactly what covers the model as the worker understands it."""
    covered: set[Cell] = set()
    for spec in specs:
        covered |= {(layer, expert) for layer, experts in parse_experts(spec, 8, 4).items() for expert in experts}
    try:
        found = objects_of(pools(*specs))
    except helm_python.HelmError:
        assert len(covered) < 32
        return
    assert len(covered) == 32
    held = held_by_pod(found, 8, 4)
    assert set().union(*held.values()) == covered


def test_the_ordinal_chooses_the_experts(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "experts.json"
    path.write_text('["0-3", "4-7@0-1"]')
    assert experts_of(str(path), {"POD_INDEX": "1"}) == "4-7@0-1"
    given_flags = ["--model=m", f"--experts-of={path}", "--dtype=float32"]
    assert with_experts(given_flags, {"POD_INDEX": "0"}) == ["--model=m", "--experts=0-3", "--dtype=float32"]


@pytest.mark.parametrize(
    ("text", "ordinal", "words"),
    [
        ('["0"]', "1", "none for ordinal 1"),
        ('["0"]', "", "must be the pod's ordinal"),
        ('["0"]', "-1", "must be the pod's ordinal"),
        ('{"0": "all"}', "0", "JSON list of strings"),
        ('["0", ""]', "0", "JSON list of strings"),
        ("0-3", "0", "Extra data"),
    ],
)
def test_a_list_that_cannot_be_is_refused(tmp_path, text: str, ordinal: str, words: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "experts.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        experts_of(str(path), {"POD_INDEX": ordinal})


def test_more_than_eight_experts_are_checked_too() -> None:
    values = VARIANTS["download"] | pools("0-7", "8-15")
    values["model"] = values["model"] | {"numExperts": 16}
    objects_of(values)
    values = values | pools("0-7", "8-14")
    with pytest.raises(helm_python.HelmError, match="nobody holds expert 15"):
        objects_of(values)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (["0-1", "1-3"], '"1-3" must begin with layer 2'),
        (["0-1", "3"], '"3" must begin with layer 2'),
        (["1-3"], '"1-3" must begin with layer 0'),
        (["2-3", "0-1"], '"2-3" must begin with layer 0'),
        (["0", "1-2"], "must end with layer 3"),
        (["0", "1-4"], "must end with layer 3"),
        (["0", "1-0", "1-3"], '"1-0" must begin with layer 1'),
    ],
)
def test_stages_that_do_not_make_a_model(layers: list[str], words: str) -> None:
    with pytest.raises(helm_python.HelmError, match=words):
        objects_of({"attention": {"stageLayers": layers}})
