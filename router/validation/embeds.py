"""Prompts that come as rows in place of token ids."""

from __future__ import annotations

import asyncio
import hashlib

import torch

from grokmoe import tensors
from grokmoe.errors import InvalidRequest, Reason
from grokmoe.model_config import ModelConfig
from grokmoe.v1 import generation_pb2 as pb
from grokmoe.v1 import tensor_pb2
from router.pages import HASH_BYTES
from router.request import PromptEmbeds

FIELD = "inputs_embeds"

INLINE_BYTES = 256 * 1024
"""Larger ones are looked through on another thread: it takes longer than the event loop should be held."""


async def read_embeds(proto: tensor_pb2.Tensor, config: ModelConfig) -> PromptEmbeds:
    """Raises InvalidRequest, naming the field, for what is no [tokens, hidden_size] of finite numbers that fits."""
    rows_TD = tensors.from_message(proto, FIELD)
    if rows_TD.dim() != 2 or rows_TD.shape[1] != config.hidden_size:
        found = list(rows_TD.shape)
        raise InvalidRequest(f"{FIELD}.shape", f"is {found}, must be [tokens, {config.hidden_size}]")
    if not len(rows_TD):
        raise InvalidRequest(f"{FIELD}.shape", "has no tokens")
    limit = config.context_length - 1
    if len(rows_TD) > limit:
        message = f"has {len(rows_TD)} tokens, the context of {limit + 1} allows {limit}"
        raise InvalidRequest(f"{FIELD}.shape", message, reason=Reason.PROMPT_TOO_LONG)
    if len(proto.data) > INLINE_BYTES:
        return await asyncio.to_thread(_look_through, rows_TD, proto.data)
    return _look_through(rows_TD, proto.data)


def _look_through(rows_TD: torch.Tensor, data: bytes) -> PromptEmbeds:
    is_finite_T = rows_TD.isfinite().all(1)
    if not is_finite_T.all():
        row = int(is_finite_T.int().argmin())
        raise InvalidRequest(f"{FIELD}.data", f"holds a value that is not finite, in the row of token {row}")
    digest = hashlib.blake2b(str((rows_TD.dtype, *rows_TD.shape)).encode(), digest_size=HASH_BYTES)
    digest.update(data)
    return PromptEmbeds(rows_TD, digest.digest())


def check_beside_embeds(proto: pb.GenerateRequest) -> None:
    """Raises InvalidRequest for what needs to know the prompt's token ids."""
    for message, name, unset in (
        ("sampling", "repetition_penalty", 1.0),  # the others count the output only
        ("response", "echo", False),
        ("response", "prompt_logprobs", None),
    ):
        part = getattr(proto, message)
        if part.HasField(name) and getattr(part, name) != unset:
            raise InvalidRequest(
                f"{message}.{name}",
                f"cannot be used while {FIELD} is set: it needs the prompt's token ids",
                reason=Reason.CONFLICTING_FIELDS,
            )
