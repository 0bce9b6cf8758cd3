"""Step plans and results to and from the wire.

Packed ids and masks are handed over as they are: what a plan costs here does not grow with the text.
"""

from __future__ import annotations

from typing import Any

import torch

from grokmoe.errors import InvalidRequest
from grokmoe.step_plan import (
    LogitsScope,
    LogprobTable,
    Penalties,
    SequenceChunk,
    StepPlan,
    StepResult,
    TokenSampling,
    TokenScoring,
)
from grokmoe.v1 import attention_pb2

_SCOPES = {
    attention_pb2.LOGITS_SCOPE_UNSPECIFIED: LogitsScope.NONE,
    attention_pb2.LOGITS_SCOPE_ALL: LogitsScope.ALL,
}
assert {int(wire): int(scope) for wire, scope in _SCOPES.items()} == {int(scope): int(scope) for scope in LogitsScope}


def plan_to_proto(plan: StepPlan) -> attention_pb2.StepPlan:
    """Renders a plan for the wire, without its tensors: those are the message's payload (`plan_payload`)."""
    proto = attention_pb2.StepPlan(incarnation=plan.incarnation, traceparents=plan.traceparents)
    for chunk in plan.chunks:
        scoring = None
        if chunk.scoring is not None:
            scoring = attention_pb2.TokenScoring(
                first=chunk.scoring.first, target_ids=chunk.scoring.target_ids, num_top=chunk.scoring.num_top
            )
        proto.chunks.add(
            token_ids=chunk.token_ids,
            start=chunk.start,
            page_ids=chunk.page_ids,
            sampling=None if chunk.sampling is None else _sampling_to_proto(chunk.sampling),
            logits=chunk.logits.value,
            scoring=scoring,
            num_embeds=0 if chunk.embeds is None else len(chunk.embeds),
        )
    return proto


def plan_payload(plan: StepPlan) -> Any:
    """The payload beside a plan on the wire: its hidden state, or the rows of its chunks; None: it has neither."""
    rows = [chunk.embeds for chunk in plan.chunks if chunk.embeds is not None]
    assert not rows or plan.hidden_state is None, "who goes on with a hidden state has no use for its beginning"
    if not rows:
        return plan.hidden_state
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _sampling_to_proto(how: TokenSampling) -> attention_pb2.TokenSampling:
    penalties = None
    if how.penalties is not None:
        penalties = attention_pb2.Penalties(
            repetition=how.penalties.repetition,
            frequency=how.penalties.frequency,
            presence=how.penalties.presence,
            prompt_ids=how.penalties.prompt_ids,
            output_ids=how.penalties.output_ids,
        )
    return attention_pb2.TokenSampling(
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        seed=how.seed,
        min_p=how.min_p,
        bias_ids=how.bias_ids,
        bias=how.bias,
        penalties=penalties,
        allowed=how.allowed,
        num_logprobs=how.num_logprobs,
    )


def num_payload_rows(proto: attention_pb2.StepPlan, is_hidden_state: bool) -> int:
    """How many rows the payload of a plan has. is_hidden_state: what it is if no chunk has rows of its own."""
    num_embeds = sum(chunk.num_embeds for chunk in proto.chunks)
    return num_embeds or (sum(len(chunk.token_ids) for chunk in proto.chunks) if is_hidden_state else 0)


def plan_from_proto(proto: attention_pb2.StepPlan, payload: Any = None) -> StepPlan:
    """Reads a plan from the wire. Whether it can be run is for the attention worker to check. payload: the message's,
    or None. Raises InvalidRequest when it has not the rows of the chunks."""
    chunks = []
    hidden_state, embeds = payload, None
    if num_embeds := sum(chunk.num_embeds for chunk in proto.chunks):
        if payload is None or len(payload.shape) != 2 or len(payload) != num_embeds:
            found = "is missing" if payload is None else f"is {list(payload.shape)}"
            raise InvalidRequest("payload", f"{found}, the chunks have {num_embeds} rows in place of token ids")
        hidden_state, embeds = None, iter(payload.split([chunk.num_embeds for chunk in proto.chunks]))
    for chunk in proto.chunks:
        try:
            scope = LogitsScope(int(chunk.logits))
        except ValueError:
            raise InvalidRequest("plan.chunks.logits", f"is {chunk.logits}: no such scope") from None
        scoring = None
        if chunk.HasField("scoring"):
            scoring = TokenScoring(chunk.scoring.first, tuple(chunk.scoring.target_ids), chunk.scoring.num_top)
        chunks.append(
            SequenceChunk(
                tuple(chunk.token_ids),
                chunk.start,
                tuple(chunk.page_ids),
                _sampling_from_proto(chunk.sampling) if chunk.HasField("sampling") else None,
                scope,
                scoring,
                rows if embeds is not None and len(rows := next(embeds)) else None,
            )
        )
    return StepPlan(proto.incarnation, tuple(chunks), hidden_state, tuple(proto.traceparents))


def _sampling_from_proto(wire: attention_pb2.TokenSampling) -> TokenSampling:
    penalties = None
    if wire.HasField("penalties"):
        penalties = Penalties(
            # Unset is 0, which would be no penalty that could be meant.
            repetition=wire.penalties.repetition or 1.0,
            frequency=wire.penalties.frequency,
            presence=wire.penalties.presence,
            prompt_ids=wire.penalties.prompt_ids,
            output_ids=wire.penalties.output_ids,
        )
    return TokenSampling(
        temperature=wire.temperature,
        top_k=wire.top_k,
        top_p=wire.top_p or 1.0,
        seed=wire.seed,
        min_p=wire.min_p,
        bias_ids=tuple(wire.bias_ids),
        bias=tuple(wire.bias),
        penalties=penalties,
        allowed=wire.allowed,
        num_logprobs=wire.num_logprobs if wire.HasField("num_logprobs") else None,
    )


def result_to_proto(result: StepResult) -> attention_pb2.StepResult:
    """Renders a result for the wire, without its logits or hidden state: they are the message's payload."""
    return attention_pb2.StepResult(
        token_ids=result.token_ids,
        logprobs=[
            attention_pb2.LogprobTable(
                token_ids=table.token_ids,
                logprobs=table.logprobs,
                ranks=table.ranks,
                num_top=table.num_top,
                top_ids=table.top_ids,
                top_logprobs=table.top_logprobs,
            )
            for table in result.logprobs
        ],
        faulty_chunks=result.faulty_chunks,
        is_hidden_state=result.hidden_state is not None,
    )


def result_from_proto(proto: attention_pb2.StepResult, payload: Any) -> StepResult:
    """Reads a result from the wire. payload: the message's, or None."""
    tables = [
        LogprobTable(
            tuple(table.token_ids),
            tuple(table.logprobs),
            tuple(table.ranks),
            table.num_top,
            table.top_ids,
            table.top_logprobs,
        )
        for table in proto.logprobs
    ]
    logits, hidden_state = (None, payload) if proto.is_hidden_state else (payload, None)
    return StepResult(tuple(proto.token_ids), logits, tuple(tables), tuple(proto.faulty_chunks), hidden_state)
