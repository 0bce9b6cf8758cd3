"""Whether a plan can be run. A plan that passes cannot fail for a reason of its own; one that does not is refused whole
and leaves the cache as it was.
"""

from __future__ import annotations

import math

import torch

from attention_worker.sampling_check import check_sampling, check_scoring, num_top_bytes
from grokmoe.errors import FailedPrecondition, InvalidRequest, Reason
from grokmoe.model_config import ModelConfig
from grokmoe.step_plan import SequenceChunk, StepPlan

MAX_TOP_BYTES = 32 * 2**20
"""Most likely tokens and their log-probabilities in one result: they travel in one message."""


class PlanCheck:
    """The limits of one attention worker.

    incarnation: whose plans are taken; changes with the holder of the lease (attention_worker/lease.py).
    """

    def __init__(
        self, config: ModelConfig, held: range, incarnation: str, num_pages: int, page_size: int, max_step_tokens: int
    ) -> None:
        """held: the layers."""
        self.incarnation = incarnation
        self._config, self._held = config, held
        self._num_pages, self._page_size, self._max_step_tokens = num_pages, page_size, max_step_tokens

    def check(self, plan: StepPlan) -> None:
        """Raises FailedPrecondition for another incarnation, InvalidRequest naming field, value and limit."""
        self.check_incarnation(plan.incarnation)
        if not plan.chunks:
            raise InvalidRequest("plan.chunks", "is empty")
        num_tokens = sum(len(chunk.token_ids) for chunk in plan.chunks)
        if num_tokens > self._max_step_tokens:
            raise InvalidRequest("plan.chunks", f"hold {num_tokens} tokens, limit is {self._max_step_tokens}")
        self._check_hidden_state(plan.hidden_state, num_tokens)
        written: set[int] = set()
        top_bytes, vocab_size = 0, self._config.vocab_size
        for index, chunk in enumerate(plan.chunks):
            field = f"plan.chunks[{index}]"
            self._check_chunk(field, chunk)
            if chunk.sampling is not None:
                check_sampling(f"{field}.sampling", chunk.sampling, vocab_size)
            if chunk.scoring is not None:
                check_scoring(f"{field}.scoring", chunk.scoring, len(chunk.token_ids), vocab_size)
            top_bytes += num_top_bytes(chunk)
            self._check_writes(field, chunk, written)
        if top_bytes > MAX_TOP_BYTES:
            raise InvalidRequest(
                "plan.chunks", f"ask for {top_bytes} bytes of most likely tokens, limit is {MAX_TOP_BYTES}"
            )

    def check_incarnation(self, incarnation: str) -> None:
        """Raises FailedPrecondition for another than this one."""
        if incarnation != self.incarnation:
            raise FailedPrecondition(
                f"the plan is for incarnation {incarnation or '(none)'}, this is {self.incarnation}: "
                "its pages are not here",
                reason=Reason.WRONG_INCARNATION,
            )

    def _check_hidden_state(self, hidden_TD: torch.Tensor | None, num_tokens: int) -> None:
        """What the layers before have computed is there if there are any, a row for every token."""
        begin = self._held.start
        if hidden_TD is None:
            if begin:
                raise InvalidRequest("payload", f"is missing: layer {begin} goes on with a hidden state")
            return
        if not begin:
            raise InvalidRequest("payload", "holds a hidden state, layer 0 begins with tokens")
        expected = (num_tokens, self._config.hidden_size)
        if tuple(hidden_TD.shape) != expected or hidden_TD.dtype != torch.float32:
            raise InvalidRequest(
                "payload",
                f"hidden state is {hidden_TD.dtype} {list(hidden_TD.shape)}, must be float32 {list(expected)}",
            )

    def _check_chunk(self, field: str, chunk: SequenceChunk) -> None:
        if not chunk.token_ids:
            raise InvalidRequest(f"{field}.token_ids", "is empty")
        largest = max(chunk.token_ids)
        if largest >= self._config.vocab_size or min(chunk.token_ids) < 0:
            raise InvalidRequest(
                f"{field}.token_ids",
                f"holds {largest}, must be below the vocabulary size {self._config.vocab_size}",
            )
        if chunk.embeds is not None:
            self._check_embeds(field, chunk)
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

    def _check_embeds(self, field: str, chunk: SequenceChunk) -> None:
        """Rows in place of token ids: here if the model begins here, and not more than there are tokens."""
        rows, first, field = chunk.embeds, self._held.start, f"{field}.num_embeds"
        if first:
            raise InvalidRequest(field, f"is {len(rows)}, layer {first} begins with no tokens")
        if len(rows) > len(chunk.token_ids):
            raise InvalidRequest(field, f"is {len(rows)}, the chunk has {len(chunk.token_ids)} tokens")
        expected = (len(rows), self._config.hidden_size)
        if tuple(rows.shape) != expected or rows.dtype != torch.float32:
            found = f"{rows.dtype} {list(rows.shape)}"
            raise InvalidRequest("payload", f"holds {found} for token ids, must be float32 {list(expected)}")

    def _check_writes(self, field: str, chunk: SequenceChunk, written: set[int]) -> None:
        """No two chunks may write into one page: what one sequence writes another would read."""
        own = chunk.page_ids[chunk.start // self._page_size :]
        clash = written.intersection(own)
        if clash:
            raise InvalidRequest(f"{field}.page_ids", f"page {min(clash)} is written by an earlier chunk, too")
        written.update(own)
