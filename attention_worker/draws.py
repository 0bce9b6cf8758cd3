"""Drawing tokens from logits: the numbers that decide, and the two ways from a number to a token.

Probabilities are float32 powers of e, good to seven digits each, whose largest is 1, so no temperature is too low to
divide by; what is summed over is float32 within a block, as a sum of 131072 of them would drift, and float64 across.

Letters: R rows, V vocabulary, P V padded to whole blocks, B blocks, S entries of a block, W likely tokens looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from attention_worker.largest import largest
from grokmoe.step_plan import TokenSampling

LOWEST_TEMPERATURE = 2.0**-126
"""A lower one counts as this: below it float32 has fewer digits. It is as good as greedy."""

BLOCK = 128
"""Weights that are summed up in float32."""

FEW_BLOCKS = 8
"""Up to so many it is faster to sum up all weights in float64."""

WIDTHS = (64, 1024, 16384)
"""How many of the likely tokens are looked at first, next and then; after them all. Most nuclei are small."""

AT_A_TIME = 2**19
"""Tokens of all rows that are put in order together, about 16 for one that is wanted: so they stay in the cache."""

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


def _mix(x: Any) -> Any:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw_by_id(
    logits_RV: torch.Tensor, max_R: torch.Tensor, hows: Sequence[TokenSampling], u_R: torch.Tensor
) -> torch.Tensor:
    """Tokens [R]: the inverse of the cumulative distribution at u, tokens in the order of their ids.

    For rows with neither top-k nor top-p. max_R: the rows' largest logits, finite.
    """
    weights_RBS = _all_weights(logits_RV, max_R, hows)
    if weights_RBS.shape[1] <= FEW_BLOCKS:
        weights_RP = weights_RBS.flatten(1).double()
        return _at(weights_RP, u_R.to(weights_RP.device) * weights_RP.sum(-1))
    block_R, rest_R = _find(_block_sums(weights_RBS), u_R)
    weights_RS = weights_RBS[torch.arange(len(hows), device=block_R.device), block_R].double()
    return block_R * BLOCK + _at(weights_RS, rest_R)


def draw_by_likelihood(
    logits_RV: torch.Tensor, max_R: torch.Tensor, hows: Sequence[TokenSampling], u_R: torch.Tensor
) -> torch.Tensor:
    """The same for rows with top-k or top-p, the most likely tokens first."""
    vocab_size, device = logits_RV.shape[1], logits_RV.device
    tokens_R = torch.empty(len(hows), dtype=torch.int64, device=device)
    totals_R = _totals(logits_RV, max_R, hows)
    # So many tokens at least decide; a row's widths follow from itself alone.
    needed = [how.top_k if 0 < how.top_k < vocab_size else 1 for how in hows]
    waiting = list(range(len(hows)))
    for width in (*(width for width in WIDTHS if width < vocab_size), vocab_size):
        now = [row for row in waiting if needed[row] <= width]
        step = max(1, AT_A_TIME // min(16 * width, vocab_size))
        for rows in (now[begin : begin + step] for begin in range(0, len(now), step)):
            values_RW, ids_RW = largest(take(logits_RV, rows), width)
            row_hows = [hows[row] for row in rows]
            weights_RW = _to_weights(values_RW - take(max_R, rows)[:, None], row_hows).double()
            index_R, missing_R = _draw_from(weights_RW, take(totals_R, rows), row_hows, take(u_R, rows))
            tokens_R[torch.tensor(rows, device=device)] = ids_RW.gather(1, index_R[:, None])[:, 0]
            for row, missing in zip(rows, missing_R.tolist(), strict=True):
                needed[row] = 0 if missing <= 0 else min(width + max(1, missing), vocab_size)
        waiting = [row for row in waiting if needed[row] > 0]
        if not waiting:
            break
    return tokens_R


def _totals(logits_RV: torch.Tensor, max_R: torch.Tensor, hows: Sequence[TokenSampling]) -> torch.Tensor:
    """What top-p is a part of, float64 [R]. With top-k that is what it leaves; NaN here, as it is not found yet."""
    totals_R = torch.full((len(hows),), float("nan"), dtype=torch.float64, device=logits_RV.device)
    rows = [row for row, how in enumerate(hows) if not 0 < how.top_k < logits_RV.shape[1]]
    if rows:
        weights_RBS = _all_weights(take(logits_RV, rows), take(max_R, rows), [hows[row] for row in rows])
        totals_R[torch.tensor(rows, device=totals_R.device)] = _block_sums(weights_RBS).sum(-1)
    return totals_R


def _draw_from(
    weights_RW: torch.Tensor, totals_R: torch.Tensor, hows: Sequence[TokenSampling], u_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices drawn, how many more tokens are missing at least until top-p is reached), both [R].

    weights_RW: of the most likely tokens, float64, the largest first. totals_R: see `_totals`.
    """
    device = weights_RW.device
    num_wide = weights_RW.shape[1]
    top_k_R = torch.tensor([how.top_k or num_wide for how in hows], device=device)
    weights_RW = weights_RW.masked_fill(torch.arange(num_wide, device=device) >= top_k_R[:, None], 0.0)
    # Summed in order, so that what stands behind changes nothing.
    cumulative_RW = weights_RW.cumsum(-1)
    top_p_R = torch.tensor([how.top_p for how in hows], dtype=torch.float64, device=device)
    limit_R = top_p_R * torch.where(totals_R.isnan(), cumulative_RW[:, -1], totals_R)
    # A token stays when the tokens before it do not reach p yet; so the first always stays.
    kept_RW = weights_RW.masked_fill(cumulative_RW - weights_RW >= limit_R[:, None], 0.0)
    # None of those that follow weighs more than the last one here; where that weighs nothing, all is here.
    last_R = weights_RW[:, -1]
    missing_R = torch.where(last_R > 0, (limit_R - cumulative_RW[:, -1]) / last_R, 0.0).clamp_(max=2.0**31)
    return _at(kept_RW, u_R.to(device) * kept_RW.sum(-1)), missing_R.ceil_().long()


def take(x_R: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Rows of x, in order; x itself where they are all of its rows."""
    return x_R if len(rows) == len(x_R) else x_R[torch.tensor(rows, dtype=torch.int64, device=x_R.device)]


def _all_weights(logits_RV: torch.Tensor, max_R: torch.Tensor, hows: Sequence[TokenSampling]) -> torch.Tensor:
    """Weights of the whole vocabulary, in blocks [R, B, S]; what pads the last one weighs nothing."""
    num_rows, vocab_size = logits_RV.shape
    padded_size = -(-vocab_size // BLOCK) * BLOCK
    weights_RP = logits_RV.new_empty(num_rows, padded_size)
    weights_RP[:, vocab_size:] = float("-inf")
    torch.sub(logits_RV, max_R[:, None], out=weights_RP[:, :vocab_size])
    return _to_weights(weights_RP, hows).view(num_rows, -1, BLOCK)


def _to_weights(below_RW: torch.Tensor, hows: Sequence[TokenSampling]) -> torch.Tensor:
    """Probabilities up to a factor, in place of the distances to the largest logit; tokens below min-p have none."""
    temperatures = [max(how.temperature, LOWEST_TEMPERATURE) for how in hows]
    below_RW.div_(below_RW.new_tensor(temperatures)[:, None]).exp_()
    for row, how in enumerate(hows):
        if how.min_p:
            # Keeps what is above the number before min-p. Many times faster than to fill where a mask is set.
            below = float(np.nextafter(np.float32(how.min_p), np.float32(0)))
            functional.threshold(below_RW[row], below, 0.0, inplace=True)
    return below_RW


def _block_sums(weights_RBS: torch.Tensor) -> torch.Tensor:
    return weights_RBS.sum(-1).double()


def _find(sums_RB: torch.Tensor, u_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the block in which the cumulative weight passes u times all, what of it is left there), both [R]."""
    cumulative_RB = sums_RB.cumsum(-1)
    target_R = u_R.to(sums_RB.device) * cumulative_RB[:, -1]
    block_R = _passing(cumulative_RB, target_R)
    before_R = functional.pad(cumulative_RB, (1, 0)).gather(1, block_R[:, None])[:, 0]
    return block_R, target_R - before_R


def _at(weights_RW: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
    """The first index [R] at which the cumulative weight exceeds the target."""
    return _passing(weights_RW.cumsum(-1), target_R)


def _passing(cumulative_RW: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
    """As `_at`. Rounding may have put a target at the sum of all or beyond: the index that reaches it is meant then.

    So what is found always weighs something.
    """
    below_all_R = cumulative_RW[:, -1] * (1 - 2.0**-53)
    target_R = torch.minimum(target_R, below_all_R).clamp_(min=0.0)
    return torch.searchsorted(cumulative_RW, target_R[:, None], right=True)[:, 0]
