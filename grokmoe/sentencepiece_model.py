"""A SentencePiece BPE model, such as Grok-1's tokenizer.model, as a tokenizer of the `tokenizers` library.

SentencePiece puts a space before the text, writes spaces as U+2581, cuts out the user-defined symbols (from left to
right, the longest first) and within each remaining part joins, again and again, the two neighbours whose union is the
piece with the highest score. What is in no piece becomes its UTF-8 bytes. The `tokenizers` library has the same parts
under other names, with one difference: text that spells a control piece, such as "[EOS]", is that piece here, and
ordinary text to SentencePiece. Control pieces are special tokens here, so that decoding can leave them out, and the
library finds special tokens in any text (`Tokenizer.find_control_symbol` tells).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers

from grokmoe.errors import ConfigError

SPACE = "\u2581"
"""How SentencePiece writes a space."""

ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]  # made at import
_Piece = ModelProto.SentencePiece


class SentencePieceModel:
    """The pieces of a model and how it treats text: only what can be converted exactly."""

    def __init__(self, proto: Any) -> None:
        """Raises ConfigError naming the property that the `tokenizers` library cannot follow."""
        pieces = list(proto.pieces)
        self.ids = {piece.piece: token_id for token_id, piece in enumerate(pieces)}
        self.scores = {piece.piece: piece.score for piece in pieces if piece.type == _Piece.NORMAL}
        symbols = [piece.piece for piece in pieces if piece.type == _Piece.USER_DEFINED]
        pattern = "|".join(map(_escape, sorted(symbols, key=len, reverse=True)))
        self._symbols = re.compile(pattern) if symbols else None
        self.unknown = [piece.piece for piece in pieces if piece.type == _Piece.UNKNOWN]
        self.special = [piece.piece for piece in pieces if piece.type in (_Piece.CONTROL, _Piece.UNKNOWN)]
        self.byte_pieces = [piece.piece for piece in pieces if piece.type == _Piece.BYTE]
        spec = proto.trainer_spec
        named = {"pad": spec.pad_piece, "bos": spec.bos_piece, "eos": spec.eos_piece, "unk": spec.unk_piece}
        self.roles = {role: piece for role, piece in named.items() if piece in self.special}
        self.has_dummy_prefix = proto.normalizer_spec.add_dummy_prefix
        reason = next(self._obstacles(proto), None)
        if reason is not None:
            raise ConfigError(reason)

    @classmethod
    def from_file(cls, path: str | Path) -> SentencePieceModel:
        """Reads a tokenizer.model. ConfigError when it is absent, not one, or one that cannot be converted."""
        proto = ModelProto()
        try:
            proto.ParseFromString(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except DecodeError as error:
            raise ConfigError(f"{path}: not a SentencePiece model") from error
        try:
            return cls(proto)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.message}") from error

    def _obstacles(self, proto: Any) -> Iterator[str]:
        trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
        kind = trainer.ModelType.Name(trainer.model_type)
        if not proto.pieces:
            yield "not a SentencePiece model: it has no pieces"
        if kind != "BPE":
            yield f"model_type is {kind}, only BPE can be converted exactly"
        if normalizer.precompiled_charsmap:
            yield f"normalizer_spec is {normalizer.name or 'not named'}, only identity can be converted exactly"
        if proto.denormalizer_spec.precompiled_charsmap:
            yield "denormalizer_spec is set, must be absent"
        if normalizer.remove_extra_whitespaces:
            yield "normalizer_spec.remove_extra_whitespaces is true, must be false"
        if not normalizer.escape_whitespaces:
            yield "normalizer_spec.escape_whitespaces is false, must be true"
        if trainer.treat_whitespace_as_suffix:
            yield "trainer_spec.treat_whitespace_as_suffix is true, must be false"
        if not trainer.byte_fallback:
            yield "trainer_spec.byte_fallback is false, must be true"
        if sorted(self.byte_pieces) != [f"<0x{byte:02X}>" for byte in range(256)]:
            yield f"has {len(self.byte_pieces)} byte pieces, must have the 256 from <0x00> to <0xFF>"
        if len(self.unknown) != 1:
            yield f"has {len(self.unknown)} unknown pieces, must have 1"
        if len(self.ids) != len(proto.pieces):
            yield f"has {len(proto.pieces)} pieces of which {len(proto.pieces) - len(self.ids)} are repeated"
        if any(piece.type == _Piece.UNUSED for piece in proto.pieces):
            yield "has pieces of type UNUSED, must have none"
        if len(set(self.scores.values())) != len(self.scores):
            yield "has pieces of equal scores, so their order is not defined by the pieces alone"
        letters = {letter for piece in self.scores if not self._has_symbol(piece) for letter in piece}
        if missing := letters - self.scores.keys():
            yield f"has a piece with {min(missing)!r}, which is not a piece itself"

    def to_backend(self) -> tokenizers.Tokenizer:
        """The tokenizer. Takes a second for the 131072 pieces of Grok-1."""
        bpe = models.BPE(
            vocab=self.ids,
            merges=self._merges(),
            unk_token=self.unknown[0],
            byte_fallback=True,
        )
        splits = []
        if self._symbols is not None:
            splits.append(self._symbols.pattern)
            splits.extend(self._splits_of_odd_words(bpe))
            # No merge leads to a symbol, so the library has to look up whole words before it merges.
            bpe.ignore_merges = True
        backend = tokenizers.Tokenizer(bpe)
        prefix = [normalizers.Prepend(SPACE)] if self.has_dummy_prefix else []
        backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
        if splits:
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in splits]
            )
        strip = [decoders.Strip(" ", 1, 0)] if self.has_dummy_prefix else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        backend.add_special_tokens(
            [tokenizers.AddedToken(piece, normalized=False, special=True) for piece in self.special]
        )
        return backend

    def _merges(self) -> list[tuple[str, str]]:
        """All ways to make a piece of two others, best piece first. SentencePiece looks unions up and has no list."""
        known = self.scores.keys()
        return [
            (piece[:cut], piece[cut:])
            for piece in sorted(known, key=self.scores.__getitem__, reverse=True)
            for cut in range(1, len(piece))
            if piece[:cut] in known and piece[cut:] in known
        ]

    def _splits_of_odd_words(self, bpe: models.BPE) -> list[str]:
        """Patterns that cut pieces which merging does not make of their own text, such as "<0x41>".

        Looked up as whole words, they would be found nevertheless. Where such a piece is all that stands between two
        user-defined symbols, the pattern finds its first token, which merging does not join to the others. They can
        make such a piece again: then the pattern is there once more.
        """
        odd_words = {}
        for piece in (*self.byte_pieces, *self.scores):
            if not self._has_symbol(piece) and len(parts := bpe.tokenize(piece)) > 1:
                text = piece.encode()
                end = parts[0].offsets[1]
                odd_words[piece] = text[:end].decode(), text[end:].decode()
        depth, words = 0, set(odd_words)
        while words:
            depth, words = depth + 1, {odd_words[word][1] for word in words} & odd_words.keys()
        pattern = "|".join(f"{_escape(head)}(?={_escape(tail)}\\z)" for head, tail in odd_words.values())
        return [rf"\A(?:{pattern})"] * depth

    def _has_symbol(self, piece: str) -> bool:
        """Whether a user-defined symbol is inside: then no text between such symbols contains the piece."""
        return self._symbols is not None and self._symbols.search(piece) is not None


def _escape(text: str) -> str:
    """A pattern for the text that every engine of regular expressions reads, not only Python's."""
    return re.escape(text).replace("\\\n", r"\n").replace("\\\t", r"\t")
