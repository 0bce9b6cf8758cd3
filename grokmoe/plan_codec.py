"""Step plans to and from the wire."""

from __future__ import annotations

from grokmoe.errors import InvalidRequest
from grokmoe.step_plan import LogitsScope, SequenceChunk, StepPlan, TokenSampling
from grokmoe.v1 import attention_pb2

_SCOPES = {
    attention_pb2.LOGITS_SCOPE_UNSPECIFIED: LogitsScope.NONE,
    attention_pb2.LOGITS_SCOPE_ALL: LogitsScope.ALL,
}
assert {int(wire): int(scope) for wire, scope in _SCOPES.items()} == {int(scope): int(scope) for scope in LogitsScope}


def plan_to_proto(plan: StepPlan) -> attention_pb2.StepPlan:
    """Renders a plan for the wire."""
    proto = attention_pb2.StepPlan(incarnation=plan.incarnation)
    for chunk in plan.chunks:
        sampling = None
        if chunk.sampling is not None:
            sampling = attention_pb2.TokenSampling(
                temperature=chunk.sampling.temperature,
                top_k=chunk.sampling.top_k,
                top_p=chunk.sampling.top_p,
                seed=chunk.sampling.seed,
            )
        proto.chunks.add(
            token_ids=chunk.token_ids,
            start=chunk.start,
            page_ids=chunk.page_ids,
            sampling=sampling,
            logits=chunk.logits.value,
        )
    return proto


def plan_from_proto(proto: attention_pb2.StepPlan) -> StepPlan:
    """Reads a plan from the wire. Whether it can be run is for the attention worker to check."""
    chunks = []
    for chunk in proto.chunks:
        sampling = None
        if chunk.HasField("sampling"):
            wire = chunk.sampling
            sampling = TokenSampling(wire.temperature, wire.top_k, wire.top_p or 1.0, wire.seed)
        try:
            scope = LogitsScope(int(chunk.logits))
        except ValueError:
            raise InvalidRequest("plan.chunks.logits", f"is {chunk.logits}: no such scope") from None
        chunks.append(SequenceChunk(tuple(chunk.token_ids), chunk.start, tuple(chunk.page_ids), sampling, scope))
    return StepPlan(proto.incarnation, tuple(chunks))
