"""Text to token ids and back, over a Hugging Face `tokenizer.json`, and back piece by piece for streaming."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from grokmoe.errors import ConfigError

_REPLACEMENT = "\ufffd"
_MAX_WINDOW = 32
"""Ids beyond which the window is cut inside a run of invalid bytes, which has no clean end to cut at."""


class Tokenizer:
    """Encodes and decodes. Adds no BOS and skips special tokens when decoding; thread-safe."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """backend: taken over; truncation and padding that its file may ask for are switched off."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special = frozenset(id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json. ConfigError when it is absent or not one."""
        if not Path(path).is_file():
            raise ConfigError(f"{path}: no such file")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path}: not a tokenizer.json: {error}") from error

    @property
    def vocab_size(self) -> int:
        """One above the highest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. A special token spelled out in the text becomes that token."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids. Special tokens and ids beyond the vocabulary are skipped, invalid UTF-8 is U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def is_text(self, token_id: int) -> bool:
        """Whether `decode` takes notice of this id."""
        return token_id not in self._special and self._backend.id_to_token(token_id) is not None


class IncrementalDecoder:
    """The text of one growing sequence; what was returned once is never taken back.

    All pieces together equal `Tokenizer.decode` of all ids. (With a byte-fallback vocabulary only if the bytes are
    UTF-8 without long runs of U+FFFD: its decoder turns a whole run of bytes into U+FFFD for one bad byte, characters
    already sent included.) Only a window of the last ids is decoded, so a token costs the same however long the
    sequence is. The window keeps the character before the new ids as context, because decoders treat the start of a
    text specially.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_emitted = 0  # characters of the window's text already returned
        self._context_end = 0  # ids of the window that the next clean cut drops

    def push(self, ids: Sequence[int]) -> str:
        """Takes new ids and returns the new text, without the start of a character that is not complete."""
        return "".join(self._push_one(token_id) for token_id in ids if self._tokenizer.is_text(token_id))

    def finish(self) -> str:
        """What was held back; the sequence is over. Call once."""
        text = self._tokenizer.decode(self._window)
        return self._emit(text, len(text))

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        # All of the trailing U+FFFD: with byte fallback a run of bytes shows one for each until the run is valid.
        complete = text.rstrip(_REPLACEMENT)
        piece = self._emit(text, len(complete))
        if piece and complete == text:
            self._window = self._window[self._context_end :]
            self._context_end = len(self._window)
            self._num_emitted = len(self._tokenizer.decode(self._window))
        elif len(self._window) > _MAX_WINDOW:
            piece += self._cut_invalid(text)
        return piece

    def _emit(self, text: str, end: int) -> str:
        piece = text[self._num_emitted : end]
        self._num_emitted = max(self._num_emitted, end)
        return piece

    def _cut_invalid(self, text: str) -> str:
        """Emits and drops the window's front up to a byte that begins a character; one is among the last four, or none.

        If the first byte after the cut continued a character begun before it, the two parts would decode to more
        replacement characters than the whole.
        """
        for cut in range(len(self._window) - 1, max(0, len(self._window) - 5), -1):
            tail = self._tokenizer.decode(self._window[cut:])
            if tail and self._tokenizer.decode(self._window[:cut]) + tail == text:
                end = len(text) - len(tail)
                piece = self._emit(text, end)
                self._window = self._window[cut:]
                self._context_end = 0
                self._num_emitted -= end
                return piece
        return ""
