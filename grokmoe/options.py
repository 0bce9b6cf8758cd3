"""What a caller may ask of a generation, and the message that carries it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

from grokmoe.errors import InvalidRequest
from grokmoe.v1 import generation_pb2 as pb

Prompt = str | Sequence[int]
"""Text, which the server tokenises, or token ids."""


class GenerateOptions(TypedDict, total=False):
    """Optional arguments of a generation. Unset or None: the server's default, named in generation.proto."""

    max_tokens: int | None
    """Most tokens to generate."""
    temperature: float | None
    """0 is greedy."""
    top_k: int | None
    """Keep the k most likely tokens; 0: all."""
    top_p: float | None
    """Keep the smallest set of tokens with this probability, in (0, 1]."""
    seed: int | None
    """The same seed and request draw the same tokens."""
    stop_token_ids: Sequence[int]
    """Ids that end generation, beside the model's own."""
    ignore_eos: bool | None
    """Do not end at the model's end-of-sequence id."""
    request_id: str | None
    """The caller's name for the request; drawn by the server if unset."""


def build_request(
    prompt: Prompt,
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool | None = None,
    request_id: str | None = None,
) -> pb.GenerateRequest:
    """Sets what is given and leaves the rest unset. TypeError, InvalidRequest: what no message can carry."""
    if isinstance(prompt, bytes | bytearray):
        raise TypeError("a prompt is text or token ids, not bytes")
    request = pb.GenerateRequest()
    _set(request, "", request_id=request_id)
    _set(request.sampling, "sampling.", temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    _set(request.stopping, "stopping.", max_tokens=max_tokens, ignore_eos=ignore_eos)
    if isinstance(prompt, str):
        _set(request, "", text=prompt)
    else:
        with _invalid("token_ids"):
            request.token_ids.CopyFrom(pb.TokenIds(ids=prompt))
    # Even an empty extend() would make the sub-message present.
    if stop_token_ids:
        with _invalid("stopping.stop_token_ids"):
            request.stopping.stop_token_ids.extend(stop_token_ids)
    return request


def _set(message: Any, path: str, **values: Any) -> None:
    for name, value in values.items():
        if value is not None:
            with _invalid(path + name):
                setattr(message, name, value)


@contextlib.contextmanager
def _invalid(field: str) -> Iterator[None]:
    """A value outside its field's wire type never reaches the server that would judge it."""
    try:
        yield
    except ValueError as error:
        raise InvalidRequest(field, str(error)) from error
