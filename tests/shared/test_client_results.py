"""Results: every field of the messages, log-probabilities, and answers put together from deltas."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import pickle
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import grokmoe
from grokmoe import AsyncClient, Client, FinishReason, TopLogprobs, cluster_status, results
from grokmoe.completion_builder import CompletionBuilder
from grokmoe.logprobs import read_logprobs
from grokmoe.v1 import control_pb2
from grokmoe.v1 import generation_pb2 as pb
from tests.shared.client_calls import ask_async, ask_sync
from tests.shared.fake_generation import VOCAB_SIZE, FakeServer


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (results.Usage, pb.Usage),
        (results.Timing, pb.Timing),
        (results.Candidate, pb.Candidate),
        (results.Completion, pb.GenerateResponse),
        (results.ScoreResult, pb.ScoreResponse),
        (results.Tokens, pb.TokenizeResponse),
        (results.ModelInfo, pb.GetModelResponse),
        (cluster_status.Worker, control_pb2.Worker),
        (cluster_status.PipelineStage, control_pb2.PipelineStage),
        (cluster_status.ExpertPlacement, control_pb2.ExpertPlacement),
        (cluster_status.LegLatency, control_pb2.LegLatency),
        (cluster_status.Status, control_pb2.GetStatusResponse),
    ],
)
def test_results_have_every_field_of_their_message(kind: type, message: Any) -> None:
    assert [field.name for field in dataclasses.fields(kind)] == field_names(message)
    assert kind.__dataclass_params__.frozen


def test_a_delta_has_every_field_of_its_message() -> None:
    renamed = ["text" if name == "text_delta" else name for name in field_names(pb.StreamGenerateResponse)]
    renamed.remove("request_id")  # AsyncStream.request_id
    assert [field.name for field in dataclasses.fields(results.Delta)] == renamed


@pytest.mark.parametrize(
    ("kind", "known", "enum"),
    [
        (results.FinishReason, results._FINISH_REASONS, pb.FinishReason),
        (cluster_status.WorkerRole, cluster_status._ROLES, control_pb2.WorkerRole),
        (cluster_status.WorkerState, cluster_status._STATES, control_pb2.WorkerState),
    ],
)
def test_every_value_of_an_enum_is_known(kind: Any, known: dict[int, Any], enum: Any) -> None:
    assert known.keys() == set(enum.values()) - {0}
    assert set(known.values()) == set(kind) - {kind.UNKNOWN}
    for number, member in known.items():
        assert enum.Name(number).endswith(f"_{member.name}")


def field_names(message: Any) -> list[str]:
    """Fields by number; those of a oneof are one, unless it has but one field (proto3 optional)."""
    names = []
    for field in message.DESCRIPTOR.fields:
        group = field.containing_oneof
        names.append(group.name if group is not None and len(group.fields) > 1 else field.name)
    return list(dict.fromkeys(names))


@pytest.mark.parametrize("ask", [ask_sync, ask_async])
def test_candidates_and_logprobs(ask: Any) -> None:
    with FakeServer() as server:
        answer = ask(server.address, "generate", "x", n=3, logprobs=2, prompt_logprobs=1, stop="!")
    assert [(each.index, each.text) for each in answer.candidates] == [(0, "Hello"), (1, "Hel11lo1"), (2, "Hel22lo2")]
    assert {each.stopped_by for each in answer.candidates} == {"!"}
    drawn = answer.logprobs[0]
    assert (drawn.token_id, drawn.logprob, drawn.rank, dict(drawn.top)) == (5, -1.5, 2, {100: -1.0, 101: -2.0})
    assert len(answer.logprobs) == len(answer.token_ids)
    first, second = answer.prompt_logprobs
    assert (first.token_id, first.logprob, first.rank, len(first.top)) == (3, None, 0, 0)
    assert (second.token_id, second.logprob, list(second.top)) == (4, -1.5, [100])


def test_what_stopped_it() -> None:
    with FakeServer() as server:
        assert ask_sync(server.address, "generate", "x", stop_token_ids=[8]).stopped_by == 8
        assert ask_sync(server.address, "generate", "x", stop_token_ids=[0]).stopped_by == 0
        assert ask_sync(server.address, "generate", "x", stop="").stopped_by == ""
        assert ask_sync(server.address, "stream", "x", stop_token_ids=[0])[-1].stopped_by == 0
        assert [delta.stopped_by for delta in ask_sync(server.address, "stream", "x", stop="!")] == [None, None, "!"]


@pytest.mark.parametrize("options", [{}, {"n": 3, "logprobs": 2, "prompt_logprobs": 0, "stop": "!"}, {"logprobs": -1}])
def test_the_deltas_of_a_stream_make_the_same_answer(options: Any) -> None:
    async def streamed(address: str) -> results.Completion:
        async with AsyncClient(address) as client:
            return await client.stream("x", **options).completion()

    with FakeServer() as server, Client(server.address) as client:
        expected = client.generate("x", **options)
        for answer in (client.stream("x", **options).completion(), asyncio.run(streamed(server.address))):
            reason = FinishReason.STOP if "n" in options else FinishReason.LENGTH
            assert [each.finish_reason for each in answer.candidates] == [reason] * options.get("n", 1)
            candidates = [dataclasses.replace(each, finish_reason="stop") for each in answer.candidates]
            assert dataclasses.replace(answer, candidates=tuple(candidates)) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [("another candidate", "candidate 7 of 1"), ("goes on", "after its end"), ("no reason", "without a finish")],
)
def test_a_server_that_breaks_the_contract(text: str, words: str) -> None:
    for ask in (ask_sync, ask_async):
        with FakeServer() as server, pytest.raises(grokmoe.InternalError, match=words):
            ask(server.address, "stream", text)


@st.composite
def interleaved(draw: Any) -> tuple[list[list[str]], list[tuple[int, int]]]:
    """Texts of each candidate, and an order in which their deltas can come: (candidate, delta)."""
    texts = draw(st.lists(st.lists(st.text(max_size=3), min_size=1, max_size=4), min_size=1, max_size=4))
    order = draw(st.permutations([index for index, each in enumerate(texts) for _ in each]))
    return texts, [(index, order[:place].count(index)) for place, index in enumerate(order)]


@given(interleaved())
def test_deltas_come_in_any_order(case: tuple[list[list[str]], list[tuple[int, int]]]) -> None:
    texts, order = case
    builder = CompletionBuilder(len(texts))
    for place, (index, part) in enumerate(order):
        assert not builder.is_complete
        finish_reason = FinishReason.LENGTH if part == len(texts[index]) - 1 else None
        usage, timing = results.Usage(1, 0, place), None
        if place == len(order) - 1:
            timing = results.Timing(0.0, 1.0, 2.0)
        text, token_ids = texts[index][part], (100 * index + part,)
        builder.add(results.Delta(index, text, token_ids, (), (), finish_reason, None, usage, timing))
    assert builder.is_complete
    answer = builder.build("name")
    assert [each.text for each in answer.candidates] == ["".join(each) for each in texts]
    assert [list(each.token_ids) for each in answer.candidates] == [
        [100 * index + part for part in range(len(each))] for index, each in enumerate(texts)
    ]
    assert answer.usage.completion_tokens == len(order) - 1
    assert answer.timing.total_seconds == 2.0


@given(st.dictionaries(st.integers(0, 2**32 - 1), st.floats(-50, 0, width=32), max_size=8))
def test_top_logprobs_are_a_mapping(values: dict[int, float]) -> None:
    values = dict(sorted(values.items(), key=lambda pair: (-pair[1], pair[0])))
    message = pb.TokenLogprobs(top_token_ids=values.keys(), top_logprobs=values.values())
    (token,) = read_logprobs([message])
    assert token.top == values
    assert list(token.top.items()) == list(values.items())
    assert token.top.most_likely(3) == tuple(list(values.items())[:3])
    for token_id in values:
        assert token.top[token_id] == values[token_id]
    assert -1 not in token.top
    with pytest.raises(KeyError):
        token.top[2**32]
    for again in (pickle.loads(pickle.dumps(token)), copy.deepcopy(token)):
        assert again == token


def test_the_whole_vocabulary_is_not_read_before_it_is_asked_for() -> None:
    size = 131_072
    messages = [pb.TokenLogprobs(token_id=1, logprob=-1.0, top_logprobs=[-2.0] * size) for _ in range(64)]
    messages[0].top_logprobs[777] = -0.5
    begin = time.thread_time()
    tokens = read_logprobs(messages)
    assert time.thread_time() - begin < 0.05, "millions of values were copied"
    top = tokens[0].top
    assert isinstance(top, TopLogprobs)
    assert (len(top), top[777], top[size - 1]) == (size, -0.5, -2.0)
    assert size not in top
    assert -1 not in top
    assert top.most_likely(2) == ((777, -0.5), (0, -2.0))
    assert repr(top) == "TopLogprobs({777: -0.5, 0: -2, 1: -2, ...}, 131072 tokens)"
    assert pickle.loads(pickle.dumps(top)) == top


def test_the_whole_vocabulary_over_the_wire() -> None:
    with FakeServer() as server:
        top = ask_sync(server.address, "generate", "x", logprobs=-1).logprobs[0].top
    assert list(top) == list(range(VOCAB_SIZE))
    assert top[8] == -2.0
