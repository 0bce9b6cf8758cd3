"""Whether a plan can be run. A plan that passes cannot fail for a reason of its own; one that does not is refused whole
and leaves the cache as it was.
"""

from __future__ import annotations

import math

from grokmoe.errors import FailedPrecondition, InvalidRequest
from grokmoe.model_config import ModelConfig
from grokmoe.step_plan import SequenceChunk, StepPlan, TokenSampling


class PlanCheck:
    """The limits of one attention worker."""

    def __init__(
        self, config: ModelConfig, incarnation: str, num_pages: int, page_size: int, max_step_tokens: int
    ) -> None:
        self._config, self._incarnation = config, incarnation
        self._num_pages, self._page_size, self._max_step_tokens = num_pages, page_size, max_step_tokens

    def check(self, plan: StepPlan) -> None:
        """Raises FailedPrecondition for another incarnation, InvalidRequest naming field, value and limit."""
        if plan.incarnation != self._incarnation:
            raise FailedPrecondition(
                f"the plan is for incarnation {plan.incarnation or '(none)'}, this is {self._incarnation}: "
                "its pages are not here"
            )
        if not plan.chunks:
            raise InvalidRequest("plan.chunks", "is empty")
        num_tokens = sum(len(chunk.token_ids) for chunk in plan.chunks)
        if num_tokens > self._max_step_tokens:
            raise InvalidRequest("plan.chunks", f"hold {num_tokens} tokens, limit is {self._max_step_tokens}")
        written: set[int] = set()
        for index, chunk in enumerate(plan.chunks):
            field = f"plan.chunks[{index}]"
            self._check_chunk(field, chunk)
            if chunk.sampling is not None:
                _check_sampling(f"{field}.sampling", chunk.sampling)
            self._check_writes(field, chunk, written)

    def _check_chunk(self, field: str, chunk: SequenceChunk) -> None:
        if not chunk.token_ids:
            raise InvalidRequest(f"{field}.token_ids", "is empty")
        largest = max(chunk.token_ids)
        if largest >= self._config.vocab_size or min(chunk.token_ids) < 0:
            raise InvalidRequest(
                f"{field}.token_ids",
                f"holds {largest}, must be below the vocabulary size {self._config.vocab_size}",
            )
        end = chunk.start + len(chunk.token_ids)
        if chunk.start < 0 or end > self._config.context_length:
            raise InvalidRequest(
                f"{field}.start", f"{chunk.start} + {len(chunk.token_ids)} tokens exceeds the context of "
                f"{self._config.context_length} positions"
            )  # fmt: skip
        needed = math.ceil(end / self._page_size)
        if len(chunk.page_ids) != needed:
            raise InvalidRequest(
                f"{field}.page_ids",
                f"has {len(chunk.page_ids)} pages, {end} positions need {needed} of {self._page_size}",
            )
        if max(chunk.page_ids) >= self._num_pages or min(chunk.page_ids) < 0:
            raise InvalidRequest(f"{field}.page_ids", f"holds {max(chunk.page_ids)}, must be below {self._num_pages}")
        if len(set(chunk.page_ids)) != needed:
            raise InvalidRequest(f"{field}.page_ids", "names a page twice")

    def _check_writes(self, field: str, chunk: SequenceChunk, written: set[int]) -> None:
        """No two chunks may write into one page: what one sequence writes another would read."""
        own = chunk.page_ids[chunk.start // self._page_size :]
        clash = written.intersection(own)
        if clash:
            raise InvalidRequest(f"{field}.page_ids", f"page {min(clash)} is written by an earlier chunk, too")
        written.update(own)


def _check_sampling(field: str, sampling: TokenSampling) -> None:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise InvalidRequest(f"{field}.temperature", f"is {sampling.temperature}, must be finite and at least 0")
    if not 0 < sampling.top_p <= 1:
        raise InvalidRequest(f"{field}.top_p", f"is {sampling.top_p}, must be in (0, 1]")
    if sampling.top_k < 0:
        raise InvalidRequest(f"{field}.top_k", f"is {sampling.top_k}, must be at least 0")
