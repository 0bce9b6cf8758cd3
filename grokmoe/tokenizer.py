"""Text to token ids and back, whole or while the ids arrive."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from grokmoe.errors import ConfigError
from grokmoe.sentencepiece_model import SentencePieceModel
from grokmoe.token_bytes import TokenBytes

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE_MODEL = "tokenizer.model"

_BARRED = re.compile(r"<\|.+\|>", re.DOTALL)


class Tokenizer:
    """Encodes and decodes; adds no BOS. Thread-safe.

    Text is the bytes of the tokens, read as UTF-8. What is not UTF-8 is U+FFFD, once for each longest beginning of a
    character, as the Unicode standard recommends; with byte fallback, other programs write more of them there (the
    `tokenizers` library one for each byte of a run of byte tokens, sound characters included).

    backend: the `tokenizers.Tokenizer` underneath, to be read only.
    control_symbols: what text from users should not be able to write: special tokens, control pieces of SentencePiece
        among them, and entries of the vocabulary such as `<|separator|>`.
    vocab_size: one above the highest id.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """backend: taken over; truncation and padding that its file may ask for are switched off.

        Raises ConfigError for one whose tokens are not bytes (grokmoe/token_bytes.py).
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.token_bytes = TokenBytes(backend)
        special = {id_: token.content for id_, token in backend.get_added_tokens_decoder().items() if token.special}
        self._shown, self._all = _TextBytes(self.token_bytes, frozenset(special)), _TextBytes(self.token_bytes)
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.control_symbols = frozenset(special.values()) | {piece for piece in vocab if _BARRED.fullmatch(piece)}

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer | None:
        """A checkpoint's tokenizer: its tokenizer.json, else its tokenizer.model, else None. Raises ConfigError."""
        directory = Path(path)
        if (directory / TOKENIZER_JSON).is_file():
            return cls.from_file(directory / TOKENIZER_JSON)
        if (directory / SENTENCEPIECE_MODEL).is_file():
            return cls(SentencePieceModel.from_file(directory / SENTENCEPIECE_MODEL).to_backend())
        return None

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json. ConfigError when it is absent or not one."""
        if not Path(path).is_file():
            raise ConfigError(f"{path}: no such file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path}: not a tokenizer.json: {error}") from error
        try:
            return cls(backend)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.message}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. A control symbol spelled out in the text becomes that token."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True, continues: bool = False) -> str:
        """The text of token ids. Ids beyond the vocabulary are skipped.

        skip_special: leave special tokens out.
        continues: the text follows another one, so a space at its beginning is one.
        """
        decoder = IncrementalDecoder(self, skip_special, continues)
        return decoder.push(ids) + decoder.finish()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary spells it; empty for ids beyond it."""
        return [self.backend.id_to_token(token_id) or "" for token_id in ids]

    def find_control_symbol(self, text: str) -> str | None:
        """The first control symbol that the text spells; the longest, where several begin there."""
        found = [(at, -len(symbol), symbol) for symbol in self.control_symbols if (at := text.find(symbol)) >= 0]
        return min(found)[2] if found else None

    def text_bytes(self, skip_special: bool = True) -> Mapping[int, bytes]:
        """What `decode` makes of each id; nothing of those it takes no notice of. Looked up like a dict, for any id."""
        return self._shown if skip_special else self._all


class _TextBytes(dict[int, bytes]):
    """Token id to the bytes it has in a text, filled as ids are asked for."""

    def __init__(self, token_bytes: TokenBytes, left_out: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self._token_bytes, self._left_out = token_bytes, left_out

    def __missing__(self, token_id: int) -> bytes:
        if token_id in self._left_out:
            return b""
        found = self._token_bytes.of(token_id)
        if found is None:  # not kept: there is no end to ids beyond the vocabulary
            return b""
        self[token_id] = found
        return found


class IncrementalDecoder:
    """The text of one growing sequence: all pieces together equal `Tokenizer.decode` of all ids, however they are cut.

    What was returned once is never taken back, and a character comes whole: its bytes are held back until then.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, continues: bool = False) -> None:
        """skip_special, continues: as for `Tokenizer.decode`."""
        self._bytes_by_id = tokenizer.text_bytes(skip_special)
        self._lead = b"" if continues else tokenizer.token_bytes.lead
        self._held = b""  # the beginning of a character

    def push(self, ids: Sequence[int]) -> str:
        """Takes new ids and returns the new text, without the start of a character that is not complete."""
        of = self._bytes_by_id
        new = of[ids[0]] if len(ids) == 1 else b"".join([of[token_id] for token_id in ids])
        if new and self._lead:
            new, self._lead = new.removeprefix(self._lead), b""
        return self._decode(new, False)

    def finish(self) -> str:
        """What was held back; the sequence is over. Call once."""
        return self._decode(b"", True)

    def _decode(self, new: bytes, is_last: bool) -> str:
        data = self._held + new
        text, num_taken = codecs.utf_8_decode(data, "replace", is_last)
        self._held = data[num_taken:]
        return text
