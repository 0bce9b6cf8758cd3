"""A compiled grammar, and where one output stands in it."""

from __future__ import annotations

from collections.abc import Sequence

import llguidance

from grokmoe.errors import InvalidRequest, Reason

NO_TOKEN = "no token of the vocabulary can continue the output"


class Grammar:
    """A compiled grammar; immutable, thread-safe."""

    def __init__(
        self, prototype: llguidance.LLMatcher, field: str, text_mask: int, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        """prototype: has consumed nothing; its id `vocab_size` stands for the end.

        field: of the request, for errors. text_mask: bit i is set if id i is text.
        """
        self._prototype = prototype
        self._field = field
        self._text_mask = text_mask
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)

    def start(self) -> Matcher:
        """For one candidate; cheap."""
        return Matcher(self._prototype.deep_copy(), self._field, self._text_mask, self._vocab_size, self._eos_token_ids)


class Matcher:
    """What may come next in one output. Not thread-safe.

    Where the output may end, the model's end-of-sequence ids are allowed. Without such ids it ends when it
    `is_complete`; a grammar that can always go on, such as the expression a*, then ends at max_tokens only.
    """

    def __init__(
        self, matcher: llguidance.LLMatcher, field: str, text_mask: int, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._matcher = matcher
        self._field = field
        self._text_mask = text_mask
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._mask: bytes | None = None
        self._is_complete = False  # as of the mask
        self._is_broken = False

    def allowed(self) -> bytes:
        """The mask of the next token: bit i % 8 of byte i // 8 is set if id i may come; 4 ceil(vocab_size / 32) bytes.

        Empty of bits if nothing fits any more: after the end, and once a token was refused. InvalidRequest if the
        grammar passes the limits of a step, or no token of the vocabulary fits it.
        """
        if self._mask is None:
            self._mask = self._compute()
        return self._mask

    def accept(self, token_id: int) -> bool:
        """Takes the token drawn. False if it does not fit; the matcher is then broken. InvalidRequest as `allowed`."""
        mask = self.allowed()
        if not 0 <= token_id < self._vocab_size or not mask[token_id // 8] >> (token_id % 8) & 1:
            self._break()
            return False
        end = token_id in self._eos_token_ids
        self._mask = None
        if not self._matcher.consume_token(self._vocab_size if end else token_id):
            raise self._error()
        if end:
            self._mask, self._is_complete = self._none(), True
        return True

    @property
    def is_complete(self) -> bool:
        """Whether nothing but an end can follow. InvalidRequest as `allowed`."""
        if self._is_broken:
            return False
        self.allowed()
        return self._is_complete

    def _compute(self) -> bytes:
        raw = int.from_bytes(self._matcher.compute_bitmask(), "little")
        if self._matcher.is_error():
            raise self._error()
        mask = raw & self._text_mask
        can_end = raw >> self._vocab_size & 1
        if not mask and not can_end:
            self._break()
            raise InvalidRequest(self._field, NO_TOKEN, reason=Reason.INVALID_GRAMMAR)
        self._is_complete = not mask
        if can_end:
            for token_id in self._eos_token_ids:
                mask |= 1 << token_id
        return mask.to_bytes(self._num_bytes, "little")

    def _break(self) -> None:
        self._is_broken = True
        self._mask = self._none()

    def _none(self) -> bytes:
        return bytes(self._num_bytes)

    @property
    def _num_bytes(self) -> int:
        return 4 * -(-self._vocab_size // 32)

    def _error(self) -> InvalidRequest:
        self._break()
        message = self._matcher.get_error()
        # A panic is what the library makes of an exception: Vocabulary.encode found no tokens for what is forced.
        if message.startswith(("panic", "NoExtension")):
            message = NO_TOKEN
        return InvalidRequest(self._field, one_line(message), reason=Reason.INVALID_GRAMMAR)


def one_line(message: str) -> str:
    """A message of the library, which may show lines of the grammar, as one short line.

    Of a long one the two ends: what is wrong stands at either.
    """
    line = " ".join(message.replace("<non-verbose/>", "").split())
    return line if len(line) <= 300 else f"{line[:100]} ... {line[-190:]}"
