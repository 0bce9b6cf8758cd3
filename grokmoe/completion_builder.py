"""The whole answer, put together from the deltas of a stream."""

from __future__ import annotations

import dataclasses

from grokmoe.errors import InternalError
from grokmoe.logprobs import TokenLogprob
from grokmoe.results import Candidate, Completion, Delta, FinishReason, Timing, Usage


@dataclasses.dataclass
class _Growing:
    """A candidate so far."""

    text: list[str] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    stopped_by: int | str | None = None


class CompletionBuilder:
    """Takes deltas of n candidates in any order among each other."""

    def __init__(self, num_candidates: int) -> None:
        self._num_candidates = num_candidates
        self._growing: dict[int, _Growing] = {}
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._usage = Usage(0, 0, 0)
        self._timing: Timing | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every candidate has ended."""
        ended = [each for each in self._growing.values() if each.finish_reason is not None]
        return len(ended) == self._num_candidates

    def add(self, delta: Delta) -> None:
        """InternalError for a candidate that was not asked for, or that had ended."""
        if delta.index >= self._num_candidates:
            raise InternalError(f"the server sent candidate {delta.index} of {self._num_candidates}")
        growing = self._growing.setdefault(delta.index, _Growing())
        if growing.finish_reason is not None:
            raise InternalError(f"the server sent more of candidate {delta.index} after its end")
        growing.text.append(delta.text)
        growing.token_ids.extend(delta.token_ids)
        growing.logprobs.extend(delta.logprobs)
        growing.finish_reason, growing.stopped_by = delta.finish_reason, delta.stopped_by
        self._prompt_logprobs += delta.prompt_logprobs
        self._usage, self._timing = delta.usage, delta.timing

    def build(self, request_id: str) -> Completion:
        """The whole answer, once it is complete."""
        return Completion(
            request_id,
            tuple(self._candidate(index, growing) for index, growing in sorted(self._growing.items())),
            self._prompt_logprobs,
            self._usage,
            self._timing or Timing(0.0, 0.0, 0.0),
        )

    @staticmethod
    def _candidate(index: int, growing: _Growing) -> Candidate:
        assert growing.finish_reason is not None, "not complete"
        return Candidate(
            index,
            "".join(growing.text),
            tuple(growing.token_ids),
            tuple(growing.logprobs),
            growing.finish_reason,
            growing.stopped_by,
        )
