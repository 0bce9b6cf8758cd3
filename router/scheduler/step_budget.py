"""How many tokens a step may have while others stream, so that none of them waits too long for its next token. Pure.

    seconds of a step = those of its decodes alone + those of each token of a prompt

Both are learned from the steps that were. A prompt that is cut so takes longer by itself: its parts read all weights
again, and each waits for the decodes beside it.
"""

from __future__ import annotations

from router.step import Step

SHARE_KEPT = 4
"""At least one in so many of the tokens that a step may have, whatever they take: prompts must not starve."""

WEIGHT = 0.25
"""Of the last step in what is expected of the next one."""

ENOUGH_TOKENS = 32
"""Tokens of prompts in a step that tell what one takes. Fewer share what the step's decodes read anyway."""


class StepBudget:
    """Of one worker."""

    def __init__(self, goal: float, most: int) -> None:
        """goal: seconds that a step with decodes may take; 0: any. most: tokens that a step has at most."""
        self._goal, self._most = goal, most
        self._decode_seconds: float | None = None
        self._token_seconds: float | None = None

    def observe(self, step: Step, seconds: float) -> None:
        """A step took so long."""
        num_decodes = step.num_decodes
        num_others = step.num_tokens - num_decodes
        if not num_others:
            self._decode_seconds = _mixed(self._decode_seconds, seconds)
        elif num_others >= ENOUGH_TOKENS:
            beside = (self._decode_seconds or 0.0) if num_decodes else 0.0
            self._token_seconds = _mixed(self._token_seconds, max(seconds - beside, 0.0) / num_others)

    def tokens(self, num_decodes: int) -> int:
        """Tokens of the next step, with so many decodes in it."""
        if not (self._goal and num_decodes and self._token_seconds):
            return self._most
        left = self._goal - (self._decode_seconds or 0.0)
        fitting = num_decodes + int(left / self._token_seconds)
        return min(self._most, max(fitting, self._most // SHARE_KEPT, num_decodes, 1))


def _mixed(known: float | None, seconds: float) -> float:
    return seconds if known is None else known + WEIGHT * (seconds - known)
