"""What a request does to its logits before a token is chosen: which are allowed, bias, penalties, in this order.

Rows of requests that ask for nothing never come here. Letters: R rows, V vocabulary, N ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from grokmoe.step_plan import Penalties, TokenSampling

NEVER = float("-inf")
"""The logit of a token that cannot be drawn."""

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_LIMITS = np.where(_BITS, np.float32(np.inf), np.float32(NEVER))
"""Byte of `TokenSampling.allowed` -> the largest logits that its 8 tokens may have."""


def unpack_ids(packed: bytes) -> np.ndarray:
    """Token ids [N] that `grokmoe.step_plan.pack_ids` packed: uint32."""
    return np.frombuffer(packed, "<u4")


def has_rules(how: TokenSampling) -> bool:
    """Whether the logits are not taken as they are."""
    return bool(how.allowed or how.bias_ids or how.penalties is not None)


def apply_rules(logits_RV: torch.Tensor, sampling: Sequence[TokenSampling]) -> None:
    """All rules of every row, in place, one float32 operation after another.

    logits_RV: float32, the caller's own copy.
    """
    apply_allowed(logits_RV, sampling)
    for logits_V, how in zip(logits_RV, sampling, strict=True):
        if how.bias_ids:
            ids_N = torch.tensor(how.bias_ids, device=logits_V.device)
            logits_V[ids_N] += torch.tensor(how.bias, dtype=torch.float32, device=logits_V.device)
        if how.penalties is not None:
            _penalize(logits_V, how.penalties)


def apply_allowed(logits_RV: torch.Tensor, sampling: Sequence[TokenSampling]) -> None:
    """Bars what is not allowed, in place."""
    vocab_size = logits_RV.shape[1]
    for logits_V, how in zip(logits_RV, sampling, strict=True):
        if how.allowed:
            # A minimum is taken many numbers at a time; to fill where a mask is set, one by one.
            limits_V = _LIMITS.take(np.frombuffer(how.allowed, np.uint8), axis=0).reshape(-1)[:vocab_size]
            torch.minimum(logits_V, torch.from_numpy(limits_V).to(logits_V.device), out=logits_V)


def first_permitted(how: TokenSampling, vocab_size: int) -> int:
    """The token of a row whose logits leave nothing: the lowest id that neither `allowed` nor the bias bars; 0 if they
    bar all."""
    permitted_V = np.ones(vocab_size, np.uint8)
    if how.allowed:
        permitted_V = np.unpackbits(np.frombuffer(how.allowed, np.uint8), count=vocab_size, bitorder="little")
    permitted_V[[token for token, bias in zip(how.bias_ids, how.bias, strict=True) if bias == NEVER]] = 0
    return int(permitted_V.argmax())


def _penalize(logits_V: torch.Tensor, how: Penalties) -> None:
    """In place. An id may be there many times: what is written is the same each time."""
    output_N = unpack_ids(how.output_ids)
    if how.repetition != 1.0:
        ids_N = _index(np.concatenate((unpack_ids(how.prompt_ids), output_N)), logits_V)
        before_N = logits_V[ids_N]
        # float64 would divide by another number: what the wire carries is float32.
        repetition = torch.tensor(how.repetition, dtype=torch.float32, device=logits_V.device)
        logits_V[ids_N] = torch.where(before_N > 0, before_N / repetition, before_N * repetition)
    if not output_N.size:
        return
    ids_N = _index(output_N, logits_V)
    after_N = logits_V[ids_N]
    if how.frequency:
        counts_N = np.bincount(output_N)[output_N].astype(np.float32)
        after_N -= torch.from_numpy(counts_N * np.float32(how.frequency)).to(logits_V.device)
    if how.presence:
        after_N -= torch.tensor(how.presence, dtype=torch.float32, device=logits_V.device)
    logits_V[ids_N] = after_N


def _index(ids_N: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(ids_N.astype(np.int64)).to(like.device)
