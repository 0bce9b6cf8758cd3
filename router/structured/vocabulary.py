"""The text of each token, and text back to tokens in the middle of another text: what a grammar has to know."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from grokmoe.tokenizer import Tokenizer

_MARK = "\x02"
"""Put before a text to tokenise it as a continuation: no tokenizer adds a space in the middle of a text."""


class Vocabulary:
    """The tokens that a structured output may consist of, for a model of `vocab_size` ids. Thread-safe.

    token_bytes: by id; empty for what is no text: control symbols, the unknown token, ids that the tokenizer lacks.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """eos_token_ids: no text either, whatever the tokenizer says."""
        self._backend = tokenizer.backend
        vocab = self._backend.get_vocab(with_added_tokens=True)
        left_out = {*tokenizer.control_symbols, getattr(self._backend.model, "unk_token", None)}
        barred = {*eos_token_ids, *(token_id for piece, token_id in vocab.items() if piece in left_out)}
        self.token_bytes = [
            (tokenizer.token_bytes.of(token_id) or b"") if token_id not in barred else b""
            for token_id in range(vocab_size)
        ]
        self._ids = {token: token_id for token_id, token in enumerate(self.token_bytes) if token}
        self._longest = max(map(len, self._ids), default=0)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text that continues another one; their bytes are exactly the text's.

        The tokenizer's own choice where that is exact, else the longest token first. ValueError if no tokens spell it.
        """
        wanted = text.encode()
        for before in ("", _MARK):
            ids = list(self._backend.encode(before + text, add_special_tokens=False).ids)
            rest = self._after(before.encode(), ids)
            if rest is not None and self._spelled(rest) == wanted:
                return rest
        return self._encode_greedily(wanted)

    def _after(self, start: bytes, ids: Sequence[int]) -> list[int] | None:
        """The ids after those that spell `start`, with spaces before it or not; None if a token crosses its end."""
        for num in range(len(ids) + 1):
            if self._spelled(ids[:num]).lstrip(b" ") == start:
                return list(ids[num:])
        return None

    def _spelled(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.token_bytes[token_id] for token_id in ids if token_id < len(self.token_bytes))

    def _encode_greedily(self, wanted: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(wanted):
            for end in range(min(len(wanted), at + self._longest), at, -1):
                if (token_id := self._ids.get(wanted[at:end])) is not None:
                    ids.append(token_id)
                    at = end
                    break
            else:
                raise ValueError(f"no token spells {wanted[at : at + 1]!r}")
        return ids
