"""Whether a worker fits into the pool, by what it says of itself. Pure; asked whenever it joins or comes back."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import torch

from grokmoe.errors import ConfigError
from grokmoe.expert_units import expert_of, num_slices_of
from grokmoe.model_config import ModelConfig
from router.placement import check_held
from router.transport.base import ExpertInfo


def check_fits(config: ModelConfig, dtype: torch.dtype, max_step_tokens: int, name: str, info: ExpertInfo) -> None:
    """Raises ConfigError when the worker serves another model, holds what there is not, or takes too few rows.

    max_step_tokens: see `check_rows`.
    """
    if info.config_hash != config.content_hash:
        raise ConfigError(
            f"{name} serves another model: config hash {info.config_hash}, expected {config.content_hash}"
        )
    if info.dtype != dtype:
        raise ConfigError(f"{name} computes in {info.dtype}, expected {dtype}")
    check_held(config, name, info.experts)
    check_rows(config, max_step_tokens, name, info)


def check_alike(name: str, info: ExpertInfo, others: Mapping[str, ExpertInfo]) -> None:
    """Raises ConfigError when the worker stores weights in another type than the others, by name, that are in use: the
    same rows would give other bits there, and experts move and fail over between workers."""
    for other_name, other in others.items():
        if info.expert_dtype != other.expert_dtype:
            stored = [each.expert_dtype or str(each.dtype).removeprefix("torch.") for each in (info, other)]
            raise ConfigError(f"{name} has its experts in {stored[0]}, {other_name} in {stored[1]}: they must be alike")


def most_rows_per_token(units: Iterable[int], experts_per_token: int) -> int:
    """Rows that a token can send to a holder of these: one for each of its experts, or for each slice of them."""
    slices_of: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for unit in set(units):
        slices_of[expert_of(unit)][num_slices_of(unit)] += 1
    # In one number of slices at a time.
    rows_E = sorted((max(counts.values()) for counts in slices_of.values()), reverse=True)
    return sum(rows_E[:experts_per_token])


def check_rows(config: ModelConfig, max_step_tokens: int, name: str, info: ExpertInfo) -> None:
    """Raises ConfigError when a step of `max_step_tokens` can send the worker more rows than it takes in one call."""
    units = (unit for unit, _, _ in info.experts)
    most = max_step_tokens * most_rows_per_token(units, config.experts_per_token)
    if info.max_rows < most:
        raise ConfigError(
            f"{name} takes {info.max_rows} rows in a call, a step of {max_step_tokens} tokens may send it {most}: "
            "lower max_step_tokens"
        )
