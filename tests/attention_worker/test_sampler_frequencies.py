"""How often the sampler draws each token, against the exact distribution. Seeds are fixed, so this never flickers."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch

from attention_worker.sampler import sample
from attention_worker.sampler_reference import distribution, ruled_logits
from grokmoe.step_plan import Penalties, TokenSampling, pack_ids

NUM_DRAWS = 8_000
LOGITS = [1.0, -2.0, 0.5, 3.0, 2.5, -1.0, 0.0, 2.0, 1.5, -0.5, 2.9]
PENALTIES = Penalties(1.5, 0.4, 0.3, prompt_ids=pack_ids([3, 1, 3]), output_ids=pack_ids([4, 4, 10, 5]))
RULES: dict[str, Any] = {
    "bias_ids": (3, 0, 8),
    "bias": (-2.0, 1.5, float("-inf")),
    "penalties": PENALTIES,
    "allowed": b"\xbf\x07\0\0",
}


def assert_frequencies(drawn: Counter[int], probabilities: dict[int, float]) -> None:
    """Pearson's chi-square, at most 3.3 standard deviations above its mean."""
    num_draws = drawn.total()
    assert set(drawn) <= set(probabilities)
    chi_square = sum((drawn[token] - num_draws * p) ** 2 / (num_draws * p) for token, p in probabilities.items())
    degrees = len(probabilities) - 1
    assert chi_square < degrees + 3.3 * math.sqrt(2 * degrees) + 3


@pytest.mark.parametrize(
    "how",
    [
        TokenSampling(1.0),
        TokenSampling(0.6),
        TokenSampling(1.0, top_k=4),
        TokenSampling(1.0, top_p=0.8),
        TokenSampling(1.0, min_p=0.3),
        TokenSampling(1.0, bias_ids=RULES["bias_ids"], bias=RULES["bias"]),
        TokenSampling(1.0, penalties=PENALTIES),
        TokenSampling(1.0, allowed=RULES["allowed"]),
        TokenSampling(1.3, top_k=6, top_p=0.7),
        TokenSampling(1.3, top_p=0.9, min_p=0.2),
        TokenSampling(1.2, **RULES),
        TokenSampling(1.2, top_k=6, min_p=0.05, **RULES),
        TokenSampling(1.5, top_k=7, top_p=0.9, min_p=0.05, **RULES),
    ],
    ids=lambda how: "-".join(f.name for f in dataclasses.fields(how) if getattr(how, f.name) != f.default),
)
def test_the_frequencies_are_those_of_the_distribution(how: TokenSampling) -> None:
    probabilities = distribution(ruled_logits(LOGITS, how), how)
    assert len(probabilities) >= 3
    hows = [dataclasses.replace(how, seed=seed) for seed in range(NUM_DRAWS)]
    tokens = sample(torch.tensor(LOGITS).expand(NUM_DRAWS, -1), hows, [17] * NUM_DRAWS)
    assert_frequencies(Counter(tokens), probabilities)


@pytest.mark.parametrize("how", [TokenSampling(1.0), TokenSampling(1.0, top_p=0.95), TokenSampling(1.0, top_k=1200)])
def test_the_blocks_of_a_long_vocabulary_have_their_frequencies(how: TokenSampling) -> None:
    """By blocks of 128 tokens: each block's frequency, and within one the frequencies of its tokens."""
    vocab_size, num_draws, step = 1536, 6000, 500
    logits_V = torch.randn(vocab_size, generator=torch.Generator().manual_seed(5))
    probabilities = distribution(logits_V.tolist(), how)
    drawn: Counter[int] = Counter()
    for begin in range(0, num_draws, step):
        hows = [dataclasses.replace(how, seed=seed) for seed in range(begin, begin + step)]
        drawn.update(sample(logits_V.expand(step, -1), hows, [3] * step))
    for key in (lambda token: token // 128, lambda token: token % 128):
        grouped: dict[int, float] = {}
        for token, p in probabilities.items():
            grouped[key(token)] = grouped.get(key(token), 0.0) + p
        counts: Counter[int] = Counter()
        for token, count in drawn.items():
            counts[key(token)] += count
        assert_frequencies(counts, grouped)


def test_ties_share_the_probability() -> None:
    hows = [TokenSampling(1.0, top_k=2, seed=seed) for seed in range(400)]
    drawn = Counter(sample(torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(400, -1), hows, [1] * 400))
    assert set(drawn) == {0, 1}, "of equals those with the lowest ids"
    assert min(drawn.values()) > 150
