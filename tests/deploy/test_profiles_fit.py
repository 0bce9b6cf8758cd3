"""The ready-made profiles fit: weights, KV pages and rows, against the card or the memory that they ask for."""

from __future__ import annotations

import itertools

import pytest

from grokmoe.expert_spec import parse_experts
from grokmoe.model_config import GROK1
from tests.deploy.rendered import PROFILES, Object, profile

GIB = 2**30

CARD_GIB = {"NVIDIA-H100-80GB-HBM3": 81559 / 1024, "NVIDIA-H200": 143771 / 1024, "NVIDIA-L40S": 46068 / 1024}
"""Product as the GPU operator labels nodes -> memory as nvidia-smi reports it, in GiB."""

CUDA_GIB = 1.5
"""Context and what the allocator cannot use: a guess on the high side, not measured."""

WEIGHTS_PER_EXPERT = 3 * GROK1.hidden_size * GROK1.intermediate_size

LARGE = [name for name in PROFILES if profile(name).get("model", {}).get("numLayers") == GROK1.num_layers]


def weight_bytes(pool: Object) -> int:
    return 1 if pool.get("settings", {}).get("expert-dtype", "").startswith("fp8") else 2


def experts_gib(spec: str, bytes_per_weight: int) -> float:
    """Weights of what a pod holds; of FP8 also a float32 scale per output, of which the shortest has 6144 weights."""
    held = parse_experts(spec, GROK1.num_experts, GROK1.num_layers)
    size = sum(map(len, held.values())) * WEIGHTS_PER_EXPERT * bytes_per_weight
    return size * (1 + 4 / GROK1.hidden_size if bytes_per_weight == 1 else 1) / GIB


def rows_gib(pool: Object, experts: Object) -> float:
    """Rows in, rows out, and between the matrices, of the largest batch."""
    rows = (experts.get("settings", {}) | pool.get("settings", {})).get("max-batch-rows", 16384)
    return float(rows * (2 * GROK1.hidden_size + GROK1.intermediate_size) * 2 / GIB)


def memory_gib(resources: Object) -> float:
    text = resources["limits"]["memory"]
    assert text.endswith("Gi")
    return float(text.removesuffix("Gi"))


def test_grok_1_has_as_many_parameters_as_they_say() -> None:
    attention = GROK1.hidden_size * (2 * GROK1.query_size + 2 * GROK1.kv_size)
    experts = GROK1.num_layers * GROK1.num_experts * WEIGHTS_PER_EXPERT
    embedding = GROK1.vocab_size * GROK1.hidden_size
    assert (experts + GROK1.num_layers * attention + embedding) / 1e9 == pytest.approx(315.7, abs=0.1)
    assert experts_gib("0@0", 2) == 1.125
    assert experts_gib("0", 2) == 72.0
    assert 2 * GROK1.num_layers * GROK1.kv_size * 2 == 128 * 2**10 * 2, "256 KiB of KV a position"


@pytest.mark.parametrize("name", LARGE)
def test_experts_fit(name: str) -> None:
    experts = profile(name)["experts"]
    for pool, (_, spec) in itertools.chain(
        *(zip(itertools.repeat(pool), enumerate(pool["pods"])) for pool in experts["pools"])
    ):
        weights = experts_gib(spec, weight_bytes(pool))
        if pool["device"] == "cpu":
            one_matrix = WEIGHTS_PER_EXPERT / 3 * 2 / GIB
            need = weights + rows_gib(pool, experts) + 2 * one_matrix + 1.0
            assert need < memory_gib(pool["resources"]) * 0.95, (pool["name"], spec, need)
        else:
            card = CARD_GIB[pool["nodeSelector"]["nvidia.com/gpu.product"]]
            need = weights + rows_gib(pool, experts) + CUDA_GIB
            assert need < card * 0.95, (pool["name"], spec, need)
            assert memory_gib(pool["resources"]) >= 8


@pytest.mark.parametrize("name", LARGE)
def test_attention_fits(name: str) -> None:
    attention = profile(name)["attention"]
    matrices = GROK1.num_layers * GROK1.hidden_size * (2 * GROK1.query_size + 2 * GROK1.kv_size)
    # The head is the embedding, packed once more.
    weights = (matrices + 2 * GROK1.vocab_size * GROK1.hidden_size) * 2 / GIB
    assert weights == pytest.approx(13.5, abs=0.01)
    on_card = attention.get("gpu", {}).get("count", 0)
    where = (
        CARD_GIB[attention["nodeSelector"]["nvidia.com/gpu.product"]] if on_card else memory_gib(attention["resources"])
    )
    assert weights + attention["kvGib"] + 4 < where * 0.95
    context_gib = GROK1.context_length * 2 * GROK1.num_layers * GROK1.kv_size * 2 / GIB
    assert attention["kvGib"] >= 16 * context_gib, "a service for more than a few"


@pytest.mark.parametrize("name", LARGE)
def test_a_step_is_not_more_than_a_worker_takes(name: str) -> None:
    """A router refuses to start with workers that take fewer rows than a step may have."""
    values = profile(name)
    tokens = values["router"]["settings"]["max-step-tokens"]
    for pool in values["experts"]["pools"]:
        taken = (values["experts"].get("settings", {}) | pool.get("settings", {})).get("max-rows", 8192)
        assert tokens * GROK1.experts_per_token <= taken
    assert tokens <= values["attention"]["settings"].get("max-step-tokens", 2048)


@pytest.mark.parametrize("name", [name for name in LARGE if name != "grok1-mixed"])
def test_no_card_idles(name: str) -> None:
    """Of each layer every card of a pool holds something, so that all compute at the same time."""
    for pool in profile(name)["experts"]["pools"]:
        for spec in pool["pods"]:
            assert set(parse_experts(spec, GROK1.num_experts, GROK1.num_layers)) == set(range(GROK1.num_layers))
