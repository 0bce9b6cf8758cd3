"""Sampling parameters: ranges and defaults."""

from __future__ import annotations

import math
import secrets

from grokmoe.errors import InvalidRequest
from grokmoe.v1 import generation_pb2 as pb
from router.request import SamplingSettings

DEFAULT_TEMPERATURE = 1.0
MAX_TEMPERATURE = 100.0
MAX_REPETITION_PENALTY = 10.0
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_BIAS_ENTRIES = 1024
MAX_CANDIDATES = 64


def read_sampling(proto: pb.SamplingParams, vocab_size: int) -> SamplingSettings:
    """Raises InvalidRequest naming field, value and limit. vocab_size: with what an adapter adds."""
    return SamplingSettings(
        temperature=_number(proto, "temperature", DEFAULT_TEMPERATURE, 0, MAX_TEMPERATURE),
        top_k=proto.top_k,
        top_p=_number(proto, "top_p", 1.0, 0, 1, open_below=True),
        min_p=_number(proto, "min_p", 0.0, 0, 1),
        repetition_penalty=_number(proto, "repetition_penalty", 1.0, 0, MAX_REPETITION_PENALTY, open_below=True),
        frequency_penalty=_number(proto, "frequency_penalty", 0.0, -MAX_PENALTY, MAX_PENALTY),
        presence_penalty=_number(proto, "presence_penalty", 0.0, -MAX_PENALTY, MAX_PENALTY),
        logit_bias=_logit_bias(proto, vocab_size),
        seed=proto.seed if proto.HasField("seed") else secrets.randbits(64),
    )


def read_num_candidates(proto: pb.SamplingParams) -> int:
    """`n`, 1 if it is unset."""
    n = proto.n if proto.HasField("n") else 1
    if not 1 <= n <= MAX_CANDIDATES:
        raise InvalidRequest("sampling.n", f"is {n}, must be in [1, {MAX_CANDIDATES}]")
    return n


def _number(
    proto: pb.SamplingParams, name: str, default: float, low: float, high: float, open_below: bool = False
) -> float:
    if not proto.HasField(name):
        return default
    value = float(getattr(proto, name))
    # Written so that NaN fails.
    if not (low < value if open_below else low <= value) or not value <= high:
        raise InvalidRequest(f"sampling.{name}", f"is {value:g}, must be in {'(['[not open_below]}{low:g}, {high:g}]")
    return value


def _logit_bias(proto: pb.SamplingParams, vocab_size: int) -> tuple[tuple[int, float], ...]:
    field = "sampling.logit_bias"
    if len(proto.logit_bias) > MAX_BIAS_ENTRIES:
        raise InvalidRequest(field, f"has {len(proto.logit_bias)} entries, limit is {MAX_BIAS_ENTRIES}")
    for token_id, bias in proto.logit_bias.items():
        if token_id >= vocab_size:
            raise InvalidRequest(field, f"names token {token_id}, must be below the vocabulary size {vocab_size}")
        if math.isnan(bias) or abs(bias) > MAX_BIAS:
            raise InvalidRequest(field, f"is {bias:g} for token {token_id}, must be in [-{MAX_BIAS:g}, {MAX_BIAS:g}]")
    return tuple(sorted(proto.logit_bias.items()))
