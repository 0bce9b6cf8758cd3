"""The bytes of a StreamGenerateResponse that has nothing but text, ids and counts, as nearly all of them have.

Written by hand: six fields do not need a protobuf object each time. The bytes are those that protobuf would produce
(a test compares them); every other message goes through protobuf.
"""

from __future__ import annotations

from collections.abc import Sequence

from grokmoe.v1 import generation_pb2 as pb

_TEXT = b"\x1a"
_TOKEN_IDS = b"\x22"
_USAGE = b"\x52"
_PROMPT_TOKENS, _CACHED_TOKENS, _COMPLETION_TOKENS = b"\x08", b"\x10", b"\x18"
_ONE_BYTE = [bytes((value,)) for value in range(0x80)]


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _ONE_BYTE[value]
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    return bytes((value & 0x7F | 0x80,)) + _varint(value >> 7)


class TokenMessages:
    """Those of one candidate of one request."""

    def __init__(self, request_id: str, index: int, prompt_tokens: int) -> None:
        self._head = pb.StreamGenerateResponse(request_id=request_id, index=index).SerializeToString()
        self._prompt_tokens = _PROMPT_TOKENS + _varint(prompt_tokens) if prompt_tokens else b""

    def encode(self, text: str, token_ids: Sequence[int], cached_tokens: int, completion_tokens: int) -> bytes:
        """One message. completion_tokens: of all candidates, so far."""
        pieces = [self._head]
        if text:
            data = text.encode()
            pieces += (_TEXT, _varint(len(data)), data)
        if token_ids:
            ids = _varint(token_ids[0]) if len(token_ids) == 1 else b"".join(map(_varint, token_ids))
            pieces += (_TOKEN_IDS, _varint(len(ids)), ids)
        usage = self._prompt_tokens
        if cached_tokens:
            usage += _CACHED_TOKENS + _varint(cached_tokens)
        if completion_tokens:
            usage += _COMPLETION_TOKENS + _varint(completion_tokens)
        pieces += (_USAGE, _varint(len(usage)), usage)
        return b"".join(pieces)
