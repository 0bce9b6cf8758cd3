"""The bytes that a token stands for, read from a tokenizer's vocabulary and decoder.

A text is the bytes of its tokens in a row, read as UTF-8, so it can be decoded token by token and a token costs the
same wherever it stands. The decoders of `tokenizer.json` that work like this: ByteLevel, as GPT-2 has it; a Sequence
of Replace, ByteFallback, Fuse and Strip, as SentencePiece vocabularies have it; none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import tokenizers

from grokmoe.errors import ConfigError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Token id to bytes. Looked up once per id and kept; thread-safe.

    lead: a text that begins with it loses it, once: the space that SentencePiece puts before every text.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Raises ConfigError for a decoder that gives a token no bytes of its own."""
        self.lead = b""
        self._backend = backend
        self._replacements: list[tuple[str, str]] = []
        self._has_byte_level = self._has_byte_pieces = False
        self._bytes_by_id: dict[int, bytes | None] = {}
        if backend.decoder is None:  # the library then writes the tokens with spaces between them
            self._prefix, self.lead = b" ", b" "
            return
        self._prefix = b""
        decoder = json.loads(backend.decoder.__getstate__())
        for stage in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
            self._add(stage)

    def of(self, token_id: int) -> bytes | None:
        """None for an id beyond the vocabulary."""
        try:
            return self._bytes_by_id[token_id]
        except KeyError:
            # Ids beyond the vocabulary are not kept: there is no end to them.
            piece = self._backend.id_to_token(token_id)
            if piece is None:
                return None
            found = self._bytes_by_id[token_id] = self._of_piece(piece)
            return found

    def _add(self, stage: Mapping[str, Any]) -> None:
        match stage:
            case {"type": "ByteLevel"}:
                self._has_byte_level = True
            case {"type": "ByteFallback"}:
                self._has_byte_pieces = True
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                self._replacements.append((old, new))
            case {"type": "Strip", "content": content, "start": 0 | 1 as start, "stop": 0}:
                self.lead = content.encode() * start
            case {"type": "Fuse"}:
                pass
            case _:
                raise ConfigError(f"the tokenizer's decoder has a stage that is not supported: {json.dumps(stage)}")

    def _of_piece(self, piece: str) -> bytes:
        for old, new in self._replacements:
            piece = piece.replace(old, new)
        if self._has_byte_pieces and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        if self._has_byte_level and all(letter in _BYTE_BY_LETTER for letter in piece):
            return bytes(_BYTE_BY_LETTER[letter] for letter in piece)
        return self._prefix + piece.encode()


def _byte_letters() -> dict[str, int]:
    """How byte-level vocabularies spell bytes: the printable ones of Latin-1 as themselves, the others from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_BY_LETTER = _byte_letters()
