"""Whether what a chunk asks of its logits can be given: every value against its limit.

A plan that passes cannot fail later. Checks cost what the plan holds: nobody pays for what nobody asks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from attention_worker.logit_rules import unpack_ids
from grokmoe.errors import InvalidRequest
from grokmoe.step_plan import WHOLE_VOCABULARY, Penalties, SequenceChunk, TokenSampling, TokenScoring


def check_sampling(field: str, how: TokenSampling, vocab_size: int) -> None:
    """Raises InvalidRequest naming field, value and limit."""
    if not (math.isfinite(how.temperature) and how.temperature >= 0):
        raise InvalidRequest(f"{field}.temperature", f"is {how.temperature}, must be finite and at least 0")
    if not 0 < how.top_p <= 1:
        raise InvalidRequest(f"{field}.top_p", f"is {how.top_p}, must be in (0, 1]")
    if how.top_k < 0:
        raise InvalidRequest(f"{field}.top_k", f"is {how.top_k}, must be at least 0")
    if not 0 <= how.min_p <= 1:
        raise InvalidRequest(f"{field}.min_p", f"is {how.min_p}, must be in [0, 1]")
    if how.bias_ids or how.bias:
        _check_bias(field, how, vocab_size)
    if how.penalties is not None:
        _check_penalties(f"{field}.penalties", how.penalties, vocab_size)
    needed = 4 * math.ceil(vocab_size / 32)
    if how.allowed and len(how.allowed) != needed:
        raise InvalidRequest(
            f"{field}.allowed", f"has {len(how.allowed)} bytes, a vocabulary of {vocab_size} needs {needed}"
        )
    if how.num_logprobs is not None:
        _check_num_top(f"{field}.num_logprobs", how.num_logprobs, vocab_size)


def check_scoring(field: str, scoring: TokenScoring, num_tokens: int, vocab_size: int) -> None:
    """Raises InvalidRequest naming field, value and limit. num_tokens: of the chunk."""
    if not 0 <= scoring.first < num_tokens:
        raise InvalidRequest(f"{field}.first", f"is {scoring.first}, must be below the chunk's {num_tokens} tokens")
    limit = num_tokens - scoring.first
    if not 1 <= len(scoring.target_ids) <= limit:
        raise InvalidRequest(
            f"{field}.target_ids",
            f"has {len(scoring.target_ids)}, must be 1 to {limit} for {num_tokens} tokens from {scoring.first} on",
        )
    _check_ids(f"{field}.target_ids", scoring.target_ids, vocab_size)
    _check_num_top(f"{field}.num_top", scoring.num_top, vocab_size)


def num_top_bytes(chunk: SequenceChunk) -> int:
    """Bytes of the chunk's most likely tokens and their log-probabilities in the result's message."""
    num = 0
    if chunk.scoring is not None and chunk.scoring.num_top > 0:
        num += len(chunk.scoring.target_ids) * chunk.scoring.num_top
    if chunk.sampling is not None and chunk.sampling.num_logprobs is not None:
        num += max(0, chunk.sampling.num_logprobs)
    return 8 * num


def _check_bias(field: str, how: TokenSampling, vocab_size: int) -> None:
    if len(how.bias) != len(how.bias_ids):
        raise InvalidRequest(f"{field}.bias", f"has {len(how.bias)} values for {len(how.bias_ids)} ids")
    _check_ids(f"{field}.bias_ids", how.bias_ids, vocab_size)
    if len(set(how.bias_ids)) != len(how.bias_ids):
        raise InvalidRequest(f"{field}.bias_ids", "names a token twice")
    for value in how.bias:
        if not value < math.inf:  # false for NaN, too
            raise InvalidRequest(f"{field}.bias", f"holds {value}, must be finite or minus infinity")


def _check_penalties(field: str, how: Penalties, vocab_size: int) -> None:
    if not (math.isfinite(how.repetition) and how.repetition > 0):
        raise InvalidRequest(f"{field}.repetition", f"is {how.repetition}, must be finite and above 0")
    for name, value in (("frequency", how.frequency), ("presence", how.presence)):
        if not math.isfinite(value):
            raise InvalidRequest(f"{field}.{name}", f"is {value}, must be finite")
    for name, packed in (("prompt_ids", how.prompt_ids), ("output_ids", how.output_ids)):
        if len(packed) % 4:
            raise InvalidRequest(f"{field}.{name}", f"has {len(packed)} bytes, must be a multiple of 4")
        if packed:
            largest = int(unpack_ids(packed).max())
            if largest >= vocab_size:
                raise InvalidRequest(
                    f"{field}.{name}", f"holds {largest}, must be below the vocabulary size {vocab_size}"
                )


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    largest, smallest = max(ids), min(ids)
    if largest >= vocab_size or smallest < 0:
        wrong = largest if largest >= vocab_size else smallest
        raise InvalidRequest(field, f"holds {wrong}, must be below the vocabulary size {vocab_size}")


def _check_num_top(field: str, num: int, vocab_size: int) -> None:
    if not WHOLE_VOCABULARY <= num <= vocab_size:
        raise InvalidRequest(
            field, f"is {num}, must be {WHOLE_VOCABULARY} (the whole vocabulary) to the vocabulary size {vocab_size}"
        )
