"""The sampler: a function of a row, its settings, its seed and its position, and its definition's result."""

from __future__ import annotations

import dataclasses
import math
from itertools import accumulate

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from attention_worker.draws import BLOCK, FEW_BLOCKS, WIDTHS, uniforms
from attention_worker.sampler import sample
from attention_worker.sampler_reference import distribution, ruled_logits, sample_row
from grokmoe.step_plan import GREEDY, Penalties, TokenSampling, pack_ids

VOCAB = 11

INF = float("inf")
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=12).map(pack_ids)
PENALTIES = st.builds(
    Penalties,
    repetition=st.sampled_from([1.0, 0.5, 1.3, 20.0]),
    frequency=st.sampled_from([0.0, 0.7, -2.0]),
    presence=st.sampled_from([0.0, 1.5, -0.1]),
    prompt_ids=IDS,
    output_ids=IDS,
)


@st.composite
def samplings(draw: st.DrawFn) -> TokenSampling:
    """Every combination of settings, each also at its default."""
    biased = draw(st.just([]) | st.lists(st.integers(0, VOCAB - 1), unique=True, max_size=VOCAB))
    bias = st.floats(-100, 100, width=32) | st.just(-INF)
    return TokenSampling(
        temperature=draw(st.sampled_from([0.0, 1e-45, 1e-3, 0.5, 1.0, 2.5, 100.0])),
        top_k=draw(st.sampled_from([0, 1, 2, 5, VOCAB - 1, VOCAB, VOCAB + 1, 10**6])),
        top_p=draw(st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])),
        min_p=draw(st.sampled_from([0.0, 1e-9, 0.03, 0.3, 1.0])),
        seed=draw(st.integers(0, 2**64 - 1)),
        bias_ids=tuple(biased),
        bias=tuple(draw(bias) for _ in biased),
        penalties=draw(st.none() | PENALTIES),
        allowed=draw(st.just(b"") | st.binary(min_size=4, max_size=4)),
    )


LOGIT = st.floats(-40, 40, width=32) | st.sampled_from([0.0, -0.0, 1.0, -INF])
UGLY = st.sampled_from([-INF, INF, float("nan"), 3e38, -3e38, 0.0, 1.0])
LOGITS = st.lists(LOGIT, min_size=VOCAB, max_size=VOCAB) | st.lists(UGLY, min_size=VOCAB, max_size=VOCAB)


def is_close_call(ruled: list[float], how: TokenSampling, position: int, margin: float = 1e-5) -> bool:
    """Whether float32 rounding may decide: min-p or top-p ends close to a token, or the draw falls between two.

    ruled: logits after the rules.
    """
    if how.temperature == 0 or not -INF < max(ruled) < INF or any(map(math.isnan, ruled)):
        return False
    if how.min_p > 0:
        ratios, best = distribution(ruled, TokenSampling(how.temperature)), max(ruled)
        top = max(ratios.values())
        unequal = (p / top for token, p in ratios.items() if ruled[token] < best)
        if any(abs(ratio - how.min_p) < margin * how.min_p for ratio in unequal):
            return True
    u = uniforms([how.seed], [position]).item()
    if any(abs(reached - u) < margin for reached in accumulate(distribution(ruled, how).values())):
        return True
    before_top_p = dataclasses.replace(how, top_p=math.nextafter(1, 0))  # not 1: that would order by id
    sums = accumulate(distribution(ruled, before_top_p).values())
    return how.top_p < 1 and any(abs(reached - how.top_p) < margin for reached in sums)


@given(st.lists(st.tuples(LOGITS, samplings(), st.integers(0, 10**6)), min_size=1, max_size=6))
def test_rows_against_the_definition_and_against_themselves_alone(
    rows: list[tuple[list[float], TokenSampling, int]],
) -> None:
    logits_RV = torch.tensor([logits for logits, _, _ in rows])
    before_RV = logits_RV.clone()
    hows, positions = [how for _, how, _ in rows], [position for _, _, position in rows]
    tokens = sample(logits_RV, hows, positions)
    assert torch.equal(logits_RV.view(torch.int32), before_RV.view(torch.int32)), "the caller's logits are as before"
    for row, (logits, how, position) in enumerate(rows):
        assert tokens[row] == sample(logits_RV[row : row + 1], [how], [position])[0], "neighbours change nothing"
        if not is_close_call(ruled_logits(logits, how), how, position):
            assert tokens[row] == sample_row(logits, how, position)


LONG = 1536
"""A vocabulary long enough for blocks and for a second look at a nucleus, short enough for plain Python."""


@given(st.integers(0, 2**31), st.sampled_from([LONG, LONG + 1]), st.sampled_from([0.1, 3.0, 8.0]), st.data())
def test_a_long_vocabulary(seed: int, vocab_size: int, spread: float, data: st.DataObject) -> None:
    """Rounded logits: many are equal, also where top-k cuts."""
    assert max(WIDTHS[1], FEW_BLOCKS * BLOCK) < LONG
    logits_RV = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    logits_RV = (logits_RV * 8).round() / 8
    how = st.builds(
        TokenSampling,
        temperature=st.sampled_from([0.0, 0.7, 1.0]),
        top_k=st.sampled_from([0, 1, 20, 64, 65, 1000, 1100]),
        top_p=st.sampled_from([0.5, 0.9, 0.99, 1.0]),
        min_p=st.sampled_from([0.0, 0.0, 0.0101, 0.3001]),
        seed=st.integers(0, 2**64 - 1),
    )
    hows = [data.draw(how) for _ in logits_RV]
    tokens = sample(logits_RV, hows, [5, 6, 7])
    for row, (logits, how, token) in enumerate(zip(logits_RV.tolist(), hows, tokens, strict=True)):
        assert token == sample(logits_RV[row : row + 1], [how], [5 + row])[0]
        if not is_close_call(logits, how, 5 + row, margin=1e-6):  # of so many tokens one is always close
            assert token == sample_row(logits, how, 5 + row)


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
    def test_one_token_left_is_greedy(self, seed: int) -> None:
        logits_RV = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
        assert sample(logits_RV, [TokenSampling(5.0, top_k=1, seed=seed)], [3]) == [1]
        assert sample(logits_RV, [TokenSampling(5.0, top_p=1e-9, seed=seed)], [3]) == [1]
        assert sample(logits_RV[:, :2], [TokenSampling(5.0, min_p=1.0, seed=seed)], [3]) == [1]

    @given(st.integers(0, 2**64 - 1), st.sampled_from([1e-320, 1e-45, 1e-38, 1e-10]))
    def test_a_very_low_temperature_is_greedy(self, seed: int, temperature: float) -> None:
        logits_RV = torch.tensor([[-50.0, 40.0, 41.0, -1.0]])
        for how in (TokenSampling(temperature, seed=seed), TokenSampling(temperature, 3, 0.9, seed)):
            assert sample(logits_RV, [how], [3]) == [2]

    @pytest.mark.parametrize("how", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.01}, {"temperature": 0.0}], ids=str)
    def test_extreme_logits(self, how: dict[str, float]) -> None:
        hows = [TokenSampling(**{"temperature": 1.0, **how}, seed=seed) for seed in range(50)]  # type: ignore[arg-type]
        for logits, expected in (
            ([3e38, -3e38, 0.0], 0),
            ([-INF, 0.0, -INF], 1),
            ([0.0, float("nan"), INF], 2),
            ([float("nan"), 1.0, -INF], 1),
        ):
            assert set(sample(torch.tensor(logits).expand(50, -1), hows, [1] * 50)) == {expected}

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_where_nothing_is_left_it_is_the_first_that_is_not_barred(self, temperature: float) -> None:
        nothing_RV = torch.tensor([[-INF] * 5, [float("nan")] * 5, [-INF] * 5, [-INF] * 5, [0.0, 1.0, 0.0, 0.0, 0.0]])
        mask, no_0_1 = b"\x1c\0\0\0", {"bias_ids": (0, 1), "bias": (-INF, -INF)}
        hows = [
            TokenSampling(temperature, seed=1),
            TokenSampling(temperature, allowed=mask),
            TokenSampling(temperature, top_k=2, **no_0_1),  # type: ignore[arg-type]
            TokenSampling(temperature, allowed=b"\3\0\0\0", **no_0_1),  # type: ignore[arg-type]
            TokenSampling(temperature, min_p=1.0),
        ]
        assert sample(nothing_RV, hows, [1] * 5) == [0, 2, 2, 0, 1]

    @given(st.integers(0, 2**64 - 1), st.integers(1, 1000))
    def test_the_position_matters(self, seed: int, position: int) -> None:
        how = TokenSampling(1.0, seed=seed)
        logits_RV = torch.zeros(1, 2**16)
        here, there = (sample(logits_RV, [how], [at])[0] for at in (position, position + 1))
        assume(here != there)
        assert sample(logits_RV, [how], [position])[0] == here
