"""From a GenerateRequest to a Request: every value checked, every default applied, nothing ignored."""

from __future__ import annotations

import math
import secrets
import uuid

from grokmoe.errors import FailedPrecondition, InvalidRequest
from grokmoe.model_config import ModelConfig
from grokmoe.tokenizer import Tokenizer
from grokmoe.v1 import generation_pb2
from router.sequence import Request, SamplingSettings

DEFAULT_MAX_TOKENS = 128
DEFAULT_TEMPERATURE = 1.0
MAX_TEMPERATURE = 100.0
MAX_STOP_TOKEN_IDS = 64
MAX_REQUEST_ID_LENGTH = 128
MAX_TEXT_BYTES = 256 * 1024
"""Text is tokenised on the event loop. 8192 tokens, the largest context, are some 30 KiB of English."""


def to_request(proto: generation_pb2.GenerateRequest, config: ModelConfig, tokenizer: Tokenizer | None) -> Request:
    """Raises InvalidRequest naming field, value and limit; FailedPrecondition for text without a tokenizer."""
    if len(proto.request_id) > MAX_REQUEST_ID_LENGTH:
        raise InvalidRequest("request_id", f"has {len(proto.request_id)} characters, limit is {MAX_REQUEST_ID_LENGTH}")
    prompt_ids = _prompt_ids(proto, config, tokenizer)
    stopping = proto.stopping
    max_tokens = stopping.max_tokens if stopping.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    if max_tokens < 1:
        raise InvalidRequest("stopping.max_tokens", "is 0, must be at least 1")
    if len(stopping.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            "stopping.stop_token_ids", f"holds {len(stopping.stop_token_ids)} ids, limit is {MAX_STOP_TOKEN_IDS}"
        )
    for token_id in stopping.stop_token_ids:
        if token_id >= config.vocab_size:
            raise InvalidRequest(
                "stopping.stop_token_ids",
                f"holds {token_id}, must be below the vocabulary size {config.vocab_size}",
            )
    eos_ids = () if stopping.ignore_eos else config.eos_token_ids
    return Request(
        request_id=proto.request_id or str(uuid.uuid4()),
        prompt_ids=prompt_ids,
        sampling=_sampling(proto.sampling),
        max_tokens=max_tokens,
        stop_ids=frozenset((*stopping.stop_token_ids, *eos_ids)),
    )


def _prompt_ids(
    proto: generation_pb2.GenerateRequest, config: ModelConfig, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    kind = proto.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("prompt", "is missing: set text or token_ids")
    if kind == "text":
        if tokenizer is None:
            raise FailedPrecondition("this model has no tokenizer: send token_ids")
        size = len(proto.text.encode())
        if size > MAX_TEXT_BYTES:
            raise InvalidRequest("text", f"has {size} bytes, limit is {MAX_TEXT_BYTES}")
        ids = tuple(tokenizer.encode(proto.text))
        if not ids:
            raise InvalidRequest("text", "is empty")
    else:
        ids = tuple(proto.token_ids.ids)
        if not ids:
            raise InvalidRequest("token_ids.ids", "is empty")
        if max(ids) >= config.vocab_size:
            raise InvalidRequest(
                "token_ids.ids", f"holds {max(ids)}, must be below the vocabulary size {config.vocab_size}"
            )
    if len(ids) >= config.context_length:
        field = "text" if kind == "text" else "token_ids.ids"
        raise InvalidRequest(
            field,
            f"has {len(ids)} tokens, the context of {config.context_length} allows {config.context_length - 1}",
        )
    return ids


def _sampling(proto: generation_pb2.SamplingParams) -> SamplingSettings:
    temperature = proto.temperature if proto.HasField("temperature") else DEFAULT_TEMPERATURE
    if not (math.isfinite(temperature) and 0 <= temperature <= MAX_TEMPERATURE):
        raise InvalidRequest("sampling.temperature", f"is {temperature}, must be in [0, {MAX_TEMPERATURE:g}]")
    top_p = proto.top_p if proto.HasField("top_p") else 1.0
    if not 0 < top_p <= 1:
        raise InvalidRequest("sampling.top_p", f"is {top_p}, must be in (0, 1]")
    seed = proto.seed if proto.HasField("seed") else secrets.randbits(64)
    return SamplingSettings(temperature=temperature, top_k=proto.top_k, top_p=top_p, seed=seed)
