"""The definition of the sampler: one row, one rule after another, float64 after the rules.

`sampler.sample` chooses the same tokens, except where the number that decides falls within its float32 rounding of a
boundary between two tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from attention_worker.draws import LOWEST_TEMPERATURE, uniforms
from attention_worker.logit_rules import unpack_ids
from grokmoe.step_plan import TokenSampling

NEVER = float("-inf")


def ruled_logits(logits: Sequence[float], how: TokenSampling) -> list[float]:
    """Logits after allowed, bias and penalties, bit for bit: every operation is one of float32."""
    ruled = [np.float32(logit) for logit in logits]
    with np.errstate(all="ignore"):
        if how.allowed:
            for token in range(len(ruled)):
                if not how.allowed[token // 8] & 1 << token % 8:
                    ruled[token] = np.float32(NEVER)
        for token, bias in zip(how.bias_ids, how.bias, strict=True):
            ruled[token] = ruled[token] + np.float32(bias)
        if how.penalties is not None:
            prompt, output = (unpack_ids(ids).tolist() for ids in (how.penalties.prompt_ids, how.penalties.output_ids))
            repetition = np.float32(how.penalties.repetition)
            for token in {*prompt, *output}:
                ruled[token] = ruled[token] / repetition if ruled[token] > 0 else ruled[token] * repetition
            for token in set(output):
                ruled[token] = ruled[token] - np.float32(output.count(token)) * np.float32(how.penalties.frequency)
                ruled[token] = ruled[token] - np.float32(how.penalties.presence)
    return [float(logit) for logit in ruled]


def distribution(logits: Sequence[float], how: TokenSampling) -> dict[int, float]:
    """Tokens that can be drawn -> probability, in the order in which the draw goes through them.

    logits: after the rules, finite or minus infinity, one at least finite. how: with a temperature.
    Order: with top-k or top-p the most likely first, otherwise by id.
    """
    temperature = float(np.float32(max(how.temperature, LOWEST_TEMPERATURE)))
    best = max(logits)
    weights = [math.exp((logit - best) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = [token for token in order if weights[token] >= how.min_p]
    order = order[: how.top_k or None]
    total, before, kept = math.fsum(weights[token] for token in order), 0.0, []
    for token in order:
        if how.top_p >= 1 or before < how.top_p * total:
            kept.append(token)
        before += weights[token]
    if not 0 < how.top_k < len(logits) and how.top_p >= 1:
        kept.sort()
    total = math.fsum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept if weights[token] > 0}


def sample_row(logits: Sequence[float], how: TokenSampling, position: int) -> int:
    """The next token of one row, as `sampler.sample` chooses it."""
    ruled = [NEVER if math.isnan(logit) else min(logit, float(np.finfo(np.float32).max)) for logit in
             ruled_logits(logits, how)]  # fmt: skip
    if max(ruled) == NEVER:
        return _first_permitted(how, len(ruled))
    if how.temperature == 0:
        return ruled.index(max(ruled))
    u, reached = uniforms([how.seed], [position]).item(), 0.0
    probabilities = distribution(ruled, how)
    for token, probability in probabilities.items():
        reached += probability
        if reached > u:
            return token
    return next(reversed(probabilities))


def _first_permitted(how: TokenSampling, vocab_size: int) -> int:
    barred = {token for token, bias in zip(how.bias_ids, how.bias, strict=True) if bias == NEVER}
    for token in range(vocab_size):
        if token not in barred and (not how.allowed or how.allowed[token // 8] & 1 << token % 8):
            return token
    return 0
