"""Gating against the equations, written as a loop over tokens."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grokmoe.model_config import ModelConfig
from router.gating import gate
from tests import goldens

BASE = goldens.config()


def config(cap: float | None, renormalize: bool, num_experts: int = 8, top_k: int = 2) -> ModelConfig:
    return dataclasses.replace(
        BASE, router_cap=cap, renormalize_gates=renormalize, num_experts=num_experts, experts_per_token=top_k
    )


def naive(x: list[float], gate_ED: list[list[float]], config: ModelConfig) -> list[tuple[float, int]]:
    """(weight, expert) of one token, the heaviest first."""
    logits = [sum(a * b for a, b in zip(x, row, strict=True)) for row in gate_ED]
    if config.router_cap is not None:
        logits = [config.router_cap * math.tanh(logit / config.router_cap) for logit in logits]
    powers = [math.exp(logit - max(logits)) for logit in logits]
    ranked = sorted(((power / sum(powers), expert) for expert, power in enumerate(powers)), reverse=True)
    chosen = ranked[: config.experts_per_token]
    total = sum(weight for weight, _ in chosen) if config.renormalize_gates else 1.0
    return [(weight / total, expert) for weight, expert in chosen]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [None, 30.0, 2.0])
@pytest.mark.parametrize("renormalize", [False, True])
@given(seed=st.integers(0, 2**32), num_tokens=st.integers(0, 6), num_experts=st.integers(1, 9), data=st.data())
def test_against_a_loop(
    dtype: torch.dtype,
    cap: float | None,
    renormalize: bool,
    seed: int,
    num_tokens: int,
    num_experts: int,
    data: st.DataObject,
) -> None:
    settings = config(cap, renormalize, num_experts, data.draw(st.integers(1, num_experts), "top_k"))
    random = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, 12, generator=random).to(dtype)
    gate_ED = torch.randn(num_experts, 12, generator=random)
    weights_TK, expert_ids_TK = gate(x_TD, gate_ED, settings)
    assert weights_TK.shape == expert_ids_TK.shape == (num_tokens, settings.experts_per_token)
    assert weights_TK.dtype == torch.float32
    assert expert_ids_TK.dtype == torch.int64
    for token in range(num_tokens):
        expected = naive(x_TD[token].double().tolist(), gate_ED.double().tolist(), settings)
        assert weights_TK[token].tolist() == pytest.approx([weight for weight, _ in expected], abs=1e-5)
        assert expert_ids_TK[token].tolist() == [expert for _, expert in expected]


def test_the_cap_tames_large_logits() -> None:
    x_TD, gate_ED = torch.tensor([[1.0]]), torch.tensor([[1e6], [1e5], [-1e6]])
    weights_TK, expert_ids_TK = gate(x_TD, gate_ED, config(30.0, False, num_experts=3))
    assert sorted(expert_ids_TK[0].tolist()) == [0, 1]
    assert weights_TK[0].tolist() == pytest.approx([0.5, 0.5]), "both are at the cap"
    weights_TK, expert_ids_TK = gate(x_TD, gate_ED, config(None, False, num_experts=3))
    assert weights_TK[0].tolist() == [1.0, 0.0]


def test_renormalised_weights_sum_to_one() -> None:
    x_TD = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    gate_ED = torch.randn(8, 12, generator=torch.Generator().manual_seed(2))
    ones_T = gate(x_TD, gate_ED, config(30.0, True))[0].sum(-1)
    assert torch.allclose(ones_T, torch.ones(50))
    assert (gate(x_TD, gate_ED, config(30.0, False))[0].sum(-1) < 1).all()


def test_a_token_is_gated_the_same_alone_and_in_company() -> None:
    x_TD = torch.randn(33, 192, generator=torch.Generator().manual_seed(1))
    gate_ED = torch.randn(8, 192, generator=torch.Generator().manual_seed(2)) / 14
    weights_TK, expert_ids_TK = gate(x_TD, gate_ED, config(30.0, True))
    for token in range(33):
        alone_1K, ids_1K = gate(x_TD[token : token + 1], gate_ED, config(30.0, True))
        assert torch.equal(ids_1K[0], expert_ids_TK[token])
        assert torch.equal(alone_1K[0], weights_TK[token])


def test_equal_logits_go_to_the_lower_expert_and_what_is_no_number_stays_one() -> None:
    gate_ED = torch.ones(8, 12)
    x_TD = torch.ones(3, 12)
    x_TD[1, 4] = math.nan
    weights_TK, expert_ids_TK = gate(x_TD, gate_ED, config(30.0, True))
    assert expert_ids_TK.tolist() == [[0, 1]] * 3
    assert weights_TK[[0, 2]].tolist() == [[0.5, 0.5]] * 2
    assert weights_TK[1].isnan().all()
