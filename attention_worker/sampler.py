"""Choosing tokens: a pure function of (logits, settings, seed, position), so that a replay draws the same.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from grokmoe.step_plan import TokenSampling

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def uniforms(seeds_R: Sequence[int], positions_R: Sequence[int]) -> torch.Tensor:
    """One number in [0, 1) per row, a function of seed and position alone: float64 [R].

    Two rounds of SplitMix64's finaliser (Steele, Lea, Flood 2014) over seed, then seed and position: neighbouring
    seeds and positions give unrelated numbers.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.array([seed & int(_MASK) for seed in seeds_R], np.uint64))
        state = _mix(state + np.array(positions_R, np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample(logits_RV: torch.Tensor, sampling: Sequence[TokenSampling], positions: Sequence[int]) -> list[int]:
    """The next token of every row.

    logits_RV: float32. positions: where each new token goes in its sequence.
    Top-k is applied first, then top-p to what is left, renormalised, as vLLM does. Equal logits are taken in the
    order of their ids.
    """
    if not sampling:
        return []
    tokens_R = logits_RV.argmax(-1)
    vocab_size = logits_RV.shape[1]
    drawn = [row for row, how in enumerate(sampling) if how.temperature > 0]
    cut = {row for row in drawn if 0 < sampling[row].top_k < vocab_size or sampling[row].top_p < 1}
    # Apart, because they draw in another order of tokens: a row's way must not depend on its neighbours.
    for draw, rows in ((_draw_cut, sorted(cut)), (_draw, [row for row in drawn if row not in cut])):
        if rows:
            hows = [sampling[row] for row in rows]
            u_R = uniforms([how.seed for how in hows], [positions[row] for row in rows])
            index_R = torch.tensor(rows)
            tokens_R[index_R] = draw(logits_RV[index_R], hows, u_R).to(tokens_R.device)
    return tokens_R.tolist()  # type: ignore[no-any-return]


def _weights(logits_RV: torch.Tensor, hows: Sequence[TokenSampling]) -> torch.Tensor:
    """Probabilities up to a factor, float64; the largest is 1, so that no temperature is too low to divide by."""
    temperature_R = torch.tensor([how.temperature for how in hows], dtype=torch.float64)
    logits_RV = logits_RV.double()
    return ((logits_RV - logits_RV.amax(-1, keepdim=True)) / temperature_R[:, None]).exp()


def _draw(logits_RV: torch.Tensor, hows: Sequence[TokenSampling], u_R: torch.Tensor) -> torch.Tensor:
    """Inverse of the cumulative distribution at u, tokens in the order of their ids. Returns tokens [R]."""
    return _invert(_weights(logits_RV, hows), u_R)


def _draw_cut(logits_RV: torch.Tensor, hows: Sequence[TokenSampling], u_R: torch.Tensor) -> torch.Tensor:
    """The same for rows with top-k or top-p, the most likely tokens first."""
    vocab_size = logits_RV.shape[1]
    # Only what can be drawn is worth sorting: the largest top_k of the batch, or all where a row has none.
    width = max(how.top_k if 0 < how.top_k < vocab_size else vocab_size for how in hows)
    sorted_RW, ids_RW = logits_RV.sort(dim=-1, descending=True, stable=True)
    sorted_RW, ids_RW = sorted_RW[:, :width], ids_RW[:, :width]
    top_k_R = torch.tensor([how.top_k or vocab_size for how in hows])
    sorted_RW = sorted_RW.masked_fill(torch.arange(width) >= top_k_R[:, None], float("-inf"))
    # Summed in order, so that the zeros behind a row's own top_k change nothing.
    weights_RW = _weights(sorted_RW, hows)
    cumulative_RW = weights_RW.cumsum(-1)
    # A token stays when the tokens before it do not reach p yet; so the first always stays.
    top_p_R = torch.tensor([how.top_p for how in hows], dtype=torch.float64)
    reached_RW = cumulative_RW - weights_RW >= top_p_R[:, None] * cumulative_RW[:, -1:]
    weights_RW = weights_RW.masked_fill(reached_RW, 0.0)
    return ids_RW.gather(1, _invert(weights_RW, u_R)[:, None])[:, 0]


def _invert(weights_RV: torch.Tensor, u_R: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight exceeds u times the sum. float64: 131072 float32 terms drift."""
    cumulative_RV = weights_RV.cumsum(-1)
    index_R = torch.searchsorted(cumulative_RV, (u_R * cumulative_RV[:, -1])[:, None], right=True)[:, 0]
    # u times the sum may round up to the sum itself; the last index that has any probability is meant then.
    last_R = (weights_RV > 0).to(torch.int8).cumsum(-1, dtype=torch.int32).argmax(-1)
    return torch.minimum(index_R, last_R)
