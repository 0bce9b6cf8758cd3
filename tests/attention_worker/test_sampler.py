"""The sampler: a function of a row, its settings, its seed and its position, with the distribution it promises."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from attention_worker.sampler import sample, uniforms
from grokmoe.step_plan import GREEDY, TokenSampling

VOCAB = 11

SAMPLINGS = st.builds(
    TokenSampling,
    temperature=st.sampled_from([0.0, 1e-45, 1e-3, 0.5, 1.0, 2.5, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 5, VOCAB - 1, VOCAB, VOCAB + 1, 10**6]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
LOGITS = st.lists(st.floats(-40, 40, width=32), min_size=VOCAB, max_size=VOCAB)


def distribution(logits: list[float], how: TokenSampling) -> dict[int, float]:
    """The exact probabilities, most likely token first: temperature, then top-k, then top-p of what is left."""
    temperature = max(how.temperature, 1e-30)
    powers = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: how.top_k or len(logits)]
    total, before, kept = sum(powers[token] for token in order), 0.0, {}
    for token in order:
        if before < how.top_p * total:
            kept[token] = powers[token]
        before += powers[token]
    return {token: power / sum(kept.values()) for token, power in kept.items()}


def naive(logits: list[float], how: TokenSampling, position: int) -> tuple[int, float]:
    """The token drawn, and how far the draw was from drawing another."""
    if how.temperature == 0:
        return max(range(len(logits)), key=lambda token: (logits[token], -token)), 1.0
    probabilities = distribution(logits, how)
    if not 0 < how.top_k < len(logits) and how.top_p >= 1:
        probabilities = dict(sorted(probabilities.items()))
    u, reached = uniforms([how.seed], [position]).item(), 0.0
    distances, drawn = [], None
    for token, probability in probabilities.items():
        reached += probability
        distances.append(abs(reached - u))
        if drawn is None and reached > u:
            drawn = token
    assert drawn is not None
    return drawn, min(distances)


def is_near_a_cut(logits: list[float], how: TokenSampling) -> bool:
    """Whether top-p falls so close to a sum of probabilities that rounding decides."""
    reached = 0.0
    for probability in distribution(logits, TokenSampling(how.temperature, how.top_k, 1.0)).values():
        reached += probability
        if abs(reached - how.top_p) < 1e-5:
            return True
    return False


@given(st.lists(st.tuples(LOGITS, SAMPLINGS, st.integers(0, 10**6)), min_size=1, max_size=6))
def test_rows_against_a_loop_and_against_themselves_alone(
    rows: list[tuple[list[float], TokenSampling, int]],
) -> None:
    logits_RV = torch.tensor([logits for logits, _, _ in rows])
    hows, positions = [how for _, how, _ in rows], [position for _, _, position in rows]
    tokens = sample(logits_RV, hows, positions)
    for row, (logits, how, position) in enumerate(rows):
        assert tokens[row] == sample(logits_RV[row : row + 1], [how], [position])[0], "neighbours change nothing"
        expected, distance = naive(logits_RV[row].double().tolist(), how, position)
        if distance > 1e-5 and not (how.top_p < 1 and is_near_a_cut(logits, how)):
            assert tokens[row] == expected


@pytest.mark.parametrize(
    "how",
    [
        TokenSampling(1.0),
        TokenSampling(0.6),
        TokenSampling(1.0, top_k=4),
        TokenSampling(1.0, top_p=0.8),
        TokenSampling(1.3, top_k=6, top_p=0.7),
    ],
    ids=str,
)
def test_the_frequencies_are_those_of_the_distribution(how: TokenSampling) -> None:
    num_draws = 20_000
    logits = [1.0, -2.0, 0.5, 3.0, 2.5, -1.0, 0.0, 2.0, 1.5, -0.5, 2.9]
    probabilities = distribution(torch.tensor(logits).double().tolist(), how)
    hows = [TokenSampling(how.temperature, how.top_k, how.top_p, seed) for seed in range(num_draws)]
    drawn = Counter(sample(torch.tensor(logits).expand(num_draws, -1), hows, [17] * num_draws))
    assert set(drawn) <= set(probabilities)
    chi_square = sum(
        (drawn[token] - num_draws * probability) ** 2 / (num_draws * probability)
        for token, probability in probabilities.items()
    )
    # The seeds are fixed, so this never flickers; 3.3 standard deviations above the mean.
    degrees = len(probabilities) - 1
    assert chi_square < degrees + 3.3 * math.sqrt(2 * degrees) + 3


class TestUniforms:
    @given(st.integers(0, 2**64 - 1), st.integers(0, 2**31))
    def test_a_function_of_seed_and_position(self, seed: int, position: int) -> None:
        alone = uniforms([seed], [position])
        assert alone.dtype == torch.float64
        assert 0 <= alone.item() < 1
        assert uniforms([3, seed, 4], [1, position, 2])[1] == alone[0]

    def test_neighbours_are_unrelated(self) -> None:
        num = 4096
        along_positions = uniforms([7] * num, range(num))
        along_seeds = uniforms(range(num), [7] * num)
        diagonal = uniforms(range(num), range(num))
        for u in (along_positions, along_seeds, diagonal):
            assert abs(u.mean() - 0.5) < 0.02
            assert abs(torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1]) < 0.05
            assert len(set(u.tolist())) == num
            assert torch.histc(u, 16, 0, 1).min() > num / 16 * 0.75


class TestCorners:
    def test_no_rows(self) -> None:
        assert sample(torch.empty(0, VOCAB), [], []) == []

    def test_greedy_takes_the_first_of_equals(self) -> None:
        assert sample(torch.tensor([[0.0, 2.0, 2.0], [3.0, 3.0, 3.0]]), [GREEDY] * 2, [1, 1]) == [1, 0]

    @given(st.integers(0, 2**64 - 1))
    def test_top_k_of_one_is_greedy(self, seed: int) -> None:
        logits_RV = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
        assert sample(logits_RV, [TokenSampling(5.0, top_k=1, seed=seed)], [3]) == [1]
        assert sample(logits_RV, [TokenSampling(5.0, top_p=1e-9, seed=seed)], [3]) == [1]

    @given(st.integers(0, 2**64 - 1), st.sampled_from([1e-45, 1e-38, 1e-10]))
    def test_a_very_low_temperature_is_greedy(self, seed: int, temperature: float) -> None:
        logits_RV = torch.tensor([[-50.0, 40.0, 41.0, -1.0]])
        for how in (TokenSampling(temperature, seed=seed), TokenSampling(temperature, 3, 0.9, seed)):
            assert sample(logits_RV, [how], [3]) == [2]

    @pytest.mark.parametrize("how", [TokenSampling(1.0), TokenSampling(1.0, top_k=2), TokenSampling(1.0, top_p=0.9)])
    def test_extreme_logits(self, how: TokenSampling) -> None:
        hows = [TokenSampling(how.temperature, how.top_k, how.top_p, seed) for seed in range(50)]
        far = torch.tensor([3e38, -3e38, 0.0]).expand(50, -1)
        assert set(sample(far, hows, [1] * 50)) == {0}
        impossible = torch.tensor([float("-inf"), 0.0, float("-inf")]).expand(50, -1)
        assert set(sample(impossible, hows, [1] * 50)) == {1}

    def test_ties_share_the_probability(self) -> None:
        hows = [TokenSampling(1.0, top_k=2, seed=seed) for seed in range(400)]
        drawn = Counter(sample(torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(400, -1), hows, [1] * 400))
        assert set(drawn) == {0, 1}, "of equals those with the lowest ids"
        assert min(drawn.values()) > 150

    @given(st.integers(0, 2**64 - 1), st.integers(1, 1000))
    def test_the_position_matters(self, seed: int, position: int) -> None:
        how = TokenSampling(1.0, seed=seed)
        logits_RV = torch.zeros(1, 2**16)
        here, there = (sample(logits_RV, [how], [at])[0] for at in (position, position + 1))
        assume(here != there)
        assert sample(logits_RV, [how], [position])[0] == here
