"""Choosing tokens: a pure function of (logits, settings, seed, position), so that a replay draws the same. What a row
gives does not depend on the rows beside it. `sampler_reference` is the definition.

Letters: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from attention_worker.draws import draw_by_id, draw_by_likelihood, take, uniforms
from attention_worker.largest import without_nan
from attention_worker.logit_rules import apply_rules, first_permitted, has_rules
from attention_worker.row_passes import first_largest
from grokmoe.step_plan import TokenSampling


def sample(logits_RV: torch.Tensor, sampling: Sequence[TokenSampling], positions: Sequence[int]) -> list[int]:
    """The next token of every row.

    logits_RV: float32, left as they are. positions: where each new token goes in its sequence.
    The order is that of `TokenSampling`; equal logits are taken in the order of their ids. A NaN counts as a token
    that cannot be drawn. Where nothing is left to draw, it is the first token that the request does not bar itself.
    """
    ruled = [row for row, how in enumerate(sampling) if has_rules(how)]
    if not ruled:
        return _choose(logits_RV, sampling, positions)
    own_RV = logits_RV[torch.tensor(ruled, device=logits_RV.device)]
    apply_rules(own_RV, [sampling[row] for row in ruled])
    plain = [row for row in range(len(sampling)) if not has_rules(sampling[row])]
    tokens = [0] * len(sampling)
    for rows, part_RV in ((ruled, own_RV), (plain, take(logits_RV, plain))):
        chosen = _choose(part_RV, [sampling[row] for row in rows], [positions[row] for row in rows])
        for row, token in zip(rows, chosen, strict=True):
            tokens[row] = token
    return tokens


def _choose(logits_RV: torch.Tensor, sampling: Sequence[TokenSampling], positions: Sequence[int]) -> list[int]:
    """`sample` of logits that are as they should be drawn from."""
    if not sampling:
        return []
    tokens_R, max_R = first_largest(logits_RV)
    empty: list[int] = []
    if not math.isfinite(max_R.sum().item()):
        logits_RV = without_nan(logits_RV)
        tokens_R, max_R = first_largest(logits_RV)
        empty = (max_R == float("-inf")).nonzero()[:, 0].tolist()
    by_id: list[int] = []
    by_likelihood: list[int] = []
    for row, how in enumerate(sampling):
        if how.temperature > 0 and row not in empty:
            is_cut = 0 < how.top_k < logits_RV.shape[1] or how.top_p < 1
            (by_likelihood if is_cut else by_id).append(row)
    for draw, rows in ((draw_by_id, by_id), (draw_by_likelihood, by_likelihood)):
        if rows:
            hows = [sampling[row] for row in rows]
            u_R = uniforms([how.seed for how in hows], [positions[row] for row in rows])
            drawn_R = draw(take(logits_RV, rows), take(max_R, rows), hows, u_R)
            tokens_R[torch.tensor(rows, device=tokens_R.device)] = drawn_R
    tokens: list[int] = tokens_R.tolist()
    for row in empty:
        tokens[row] = first_permitted(sampling[row], logits_RV.shape[1])
    return tokens
