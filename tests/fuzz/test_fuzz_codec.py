"""The codec of tensors and plans: any bytes are a message or InvalidRequest, and what is encoded comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grokmoe import tensors
from grokmoe.errors import InvalidRequest
from grokmoe.plan_codec import plan_from_proto, plan_to_proto
from grokmoe.v1 import attention_pb2, expert_pb2
from tests.fuzz.messages import messages, mutated, wire

KINDS = {
    expert_pb2.ForwardRequest: "request_id",
    expert_pb2.ForwardResponse: "request_id",
    attention_pb2.StepRequest: "step_id",
    attention_pb2.StepResponse: "step_id",
}
VALID = tensors.encode(expert_pb2.ForwardRequest(request_id=1, expert_ids=[1], counts=[2]), torch.ones(2, 4))
anything = st.sampled_from(list(KINDS)).flatmap(
    lambda kind: st.tuples(st.just(kind), wire(kind.DESCRIPTOR) | mutated(st.just(VALID)) | st.binary(max_size=64))
)


@settings(max_examples=150)
@given(anything)
def test_any_bytes_are_a_message_or_refused(given_: tuple[Any, bytes]) -> None:
    kind, data = given_
    try:
        header, payload = tensors.decode(kind, data)
    except InvalidRequest:
        return
    assert not header.HasField("payload")
    assert payload is None or payload.numel() * payload.element_size() <= len(data)


@settings(max_examples=60)
@given(st.sampled_from(list(KINDS)), st.lists(anything.map(lambda pair: pair[1]), max_size=6))
def test_parts_in_any_order_never_take_more_than_their_bound(kind: Any, parts: list[bytes]) -> None:
    rows: Any = tensors.RowAssembler(kind, KINDS[kind], max_rows=64, width=4)
    for part in parts:
        try:
            rows.add(part)
        except InvalidRequest:
            continue
        assert len(rows._open) <= tensors.MAX_UNFINISHED
        assert all(whole.shape[0] <= 64 for _, whole, _ in rows._open.values())


@settings(max_examples=60)
@given(messages(attention_pb2.StepPlan.DESCRIPTOR))
def test_a_plan_survives_the_way_or_is_refused(proto: Any) -> None:
    try:
        plan = plan_from_proto(proto)
    except InvalidRequest:
        return
    assert repr(plan_from_proto(plan_to_proto(plan))) == repr(plan)  # repr: NaN is not equal to itself


@pytest.mark.parametrize("size", [0, 1, 15])
def test_a_message_that_is_cut_short_is_refused(size: int) -> None:
    with pytest.raises(InvalidRequest):
        tensors.decode(expert_pb2.ForwardRequest, VALID[: len(VALID) - 1 - size])
