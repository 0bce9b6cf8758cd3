"""Plans and results go over the wire as they are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grokmoe.errors import InvalidRequest
from grokmoe.plan_codec import plan_from_proto, plan_to_proto, result_from_proto, result_to_proto
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

UINT32, INT32 = st.integers(0, 2**32 - 1), st.integers(-(2**31), 2**31 - 1)
FLOAT = st.floats(width=32, allow_nan=False)
POSITIVE = st.floats(0, width=32, exclude_min=True)
IDS = st.lists(UINT32, max_size=5).map(tuple)

SAMPLINGS = st.builds(
    TokenSampling,
    temperature=FLOAT,
    top_k=UINT32,
    top_p=POSITIVE,
    seed=st.integers(0, 2**64 - 1),
    min_p=FLOAT,
    bias_ids=IDS,
    bias=st.lists(FLOAT, max_size=5).map(tuple),
    penalties=st.none() | st.builds(Penalties, POSITIVE, FLOAT, FLOAT, st.binary(max_size=9), st.binary(max_size=9)),
    allowed=st.binary(max_size=9),
    num_logprobs=st.none() | INT32,
)
CHUNKS = st.builds(
    SequenceChunk,
    token_ids=IDS,
    start=UINT32,
    page_ids=IDS,
    sampling=st.none() | SAMPLINGS,
    logits=st.sampled_from(LogitsScope),
    scoring=st.none() | st.builds(TokenScoring, UINT32, IDS, INT32),
)
PLANS = st.builds(StepPlan, st.text(max_size=5), st.lists(CHUNKS, max_size=4).map(tuple))
TABLES = st.builds(
    LogprobTable,
    token_ids=IDS,
    logprobs=st.lists(FLOAT, max_size=5).map(tuple),
    ranks=IDS,
    num_top=UINT32,
    top_ids=st.binary(max_size=9),
    top_logprobs=st.binary(max_size=9),
)
RESULTS = st.builds(StepResult, IDS, st.none(), st.lists(TABLES, max_size=4).map(tuple))


@given(PLANS)
def test_a_plan_there_and_back(plan: StepPlan) -> None:
    data = plan_to_proto(plan).SerializeToString()
    assert plan_from_proto(attention_pb2.StepPlan.FromString(data)) == plan


@given(RESULTS)
def test_a_result_there_and_back(result: StepResult) -> None:
    data = result_to_proto(result).SerializeToString()
    assert result_from_proto(attention_pb2.StepResult.FromString(data), None) == result


def test_logits_travel_beside_the_result() -> None:
    logits_RV = torch.zeros(1, 2)
    assert result_from_proto(attention_pb2.StepResult(token_ids=[3]), logits_RV).logits is logits_RV


def test_a_hidden_state_travels_beside_plan_and_result() -> None:
    """Whether a payload is one is said, not guessed."""
    hidden_TD = torch.ones(2, 3)
    assert plan_from_proto(plan_to_proto(StepPlan("", (), hidden_TD)), hidden_TD).hidden_state is hidden_TD
    proto = result_to_proto(StepResult((), faulty_chunks=(1,), hidden_state=hidden_TD))
    result = result_from_proto(proto, hidden_TD)
    assert (result.logits, result.faulty_chunks) == (None, (1,))
    assert result.hidden_state is hidden_TD


def test_unset_fields_ask_for_nothing() -> None:
    chunk = {"token_ids": [1], "page_ids": [0], "sampling": {"penalties": {}}}
    (found,) = plan_from_proto(attention_pb2.StepPlan(chunks=[chunk])).chunks
    assert found.scoring is None
    assert found.sampling == TokenSampling(penalties=Penalties())


def test_minus_infinity_bars_on_the_other_side_too() -> None:
    plan = StepPlan("", (SequenceChunk((1,), 0, (0,), TokenSampling(bias_ids=(5,), bias=(-math.inf,))),))
    assert plan_from_proto(plan_to_proto(plan)) == plan


def test_a_scope_that_is_not_known_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"plan\.chunks\.logits: is 1: no such scope"):
        plan_from_proto(attention_pb2.StepPlan(chunks=[{"logits": 1}]))  # type: ignore[list-item]
