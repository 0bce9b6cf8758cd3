"""The text of one candidate while its tokens arrive: whole characters, stop strings, the echoed prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from grokmoe.tokenizer import IncrementalDecoder, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSettings:
    """What a request wants of its text.

    stop_strings: none empty. Looked for in generated text only.
    include_stop_string: the text ends after the stop string, not before it.
    skip_special_tokens: leave special tokens out.
    min_tokens: a stop string does not count if one of the first so many tokens completes it.
    wants_text: False: no text, stop strings still count.
    prompt_text: what the text begins with.
    """

    stop_strings: tuple[str, ...] = ()
    include_stop_string: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    wants_text: bool = True
    prompt_text: str = ""


@dataclasses.dataclass(frozen=True)
class TextPiece:
    """What a push gives.

    text: new text. Nothing later takes it back.
    num_tokens: how many of the ids belong to the output; those after it were drawn in vain.
    stop_string: the one that was found. The stream is then over.
    """

    text: str
    num_tokens: int
    stop_string: str | None


class TextStream:
    """Turns ids into text that can be sent. What could be the beginning of a stop string waits for what follows it.

    Of several stop strings counts the one that the earliest token completes; of those, the one that begins first; of
    those, the shortest. How the ids are cut into pushes changes nothing. Keeps no text but what waits, which is shorter
    than the longest stop string.
    """

    def __init__(self, tokenizer: Tokenizer, settings: TextSettings) -> None:
        self._settings = settings
        self._stops = sorted(set(settings.stop_strings), key=len)
        self._is_decoded = settings.wants_text or bool(self._stops)
        self._decoder = IncrementalDecoder(tokenizer, settings.skip_special_tokens, continues=True)
        self._unsent_prompt = settings.prompt_text
        self._tail = ""  # generated text that waits
        self._num_tokens = 0
        self._is_over = False

    def push(self, token_ids: Sequence[int], ended: bool = False, ends_with_stop_token: bool = False) -> TextPiece:
        """Takes the ids drawn since the last call.

        ended: they are the last, so nothing waits any more.
        ends_with_stop_token: the last of them is no text.

        After the end all ids are void.
        """
        if self._is_over:
            return TextPiece("", 0, None)
        self._is_over = ended
        visible = token_ids[:-1] if ends_with_stop_token else token_ids
        if not self._stops:
            return self._piece(self._decode(visible, ended), len(token_ids), None)
        sendable = []
        for num_tokens, token_id in enumerate(visible, 1):
            text, stop = self._search(self._decoder.push((token_id,)), self._num_tokens + num_tokens)
            sendable.append(text)
            if stop is not None:
                return self._stop(sendable, num_tokens, stop)
        self._num_tokens += len(visible)
        if ended:
            text, stop = self._search(self._decoder.finish(), self._num_tokens)
            sendable.append(text)
            if stop is not None:
                return self._stop(sendable, len(visible), stop)
            sendable.append(self._tail)
        return self._piece("".join(sendable), len(token_ids), None)

    def _decode(self, token_ids: Sequence[int], ended: bool) -> str:
        if not self._is_decoded:
            return ""
        text = self._decoder.push(token_ids)
        return text + self._decoder.finish() if ended else text

    def _search(self, new: str, num_tokens: int) -> tuple[str, str | None]:
        """Adds text that the `num_tokens`-th token completed. Returns what can be sent, and the stop string found."""
        if not new:
            return "", None
        num_old, text = len(self._tail), self._tail + new
        if num_tokens > self._settings.min_tokens:
            # Whatever ends in the old text has been searched, or must not count.
            found = [
                (at, stop) for stop in self._stops if (at := text.find(stop, max(0, num_old - len(stop) + 1))) >= 0
            ]
            if found:
                at, stop = min(found, key=lambda item: item[0])
                return text[: at + len(stop) * self._settings.include_stop_string], stop
        start = min(_possible_start(text, stop) for stop in self._stops)
        self._tail = text[start:]
        return text[:start], None

    def _stop(self, sendable: Sequence[str], num_tokens: int, stop: str) -> TextPiece:
        self._is_over = True
        return self._piece("".join(sendable), num_tokens, stop)

    def _piece(self, text: str, num_tokens: int, stop: str | None) -> TextPiece:
        if not self._settings.wants_text:
            return TextPiece("", num_tokens, stop)
        prompt, self._unsent_prompt = self._unsent_prompt, ""
        return TextPiece(prompt + text, num_tokens, stop)


def _possible_start(text: str, stop: str) -> int:
    """Where the longest end of `text` begins that is a beginning of `stop`, but not all of it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return at if at >= 0 else len(text)
