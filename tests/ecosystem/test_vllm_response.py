"""Parts of our stream become messages of vLLM's service."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("smg_grpc_proto")

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from grokmoe.v1 import generation_pb2 as pb
from router.vllm_engine.response import ResponseWriter, input_logprobs, output_logprobs

STOP, LENGTH, ABORTED = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_ABORTED
PROMPT = [pb.TokenLogprobs(token_id=8), pb.TokenLogprobs(token_id=9, logprob=-0.5, rank=1)]


def part(index: int, ids: list[int], reason: Any = 0, **more: Any) -> pb.StreamGenerateResponse:
    logprobs = [pb.TokenLogprobs(token_id=each, logprob=-each / 4, rank=1) for each in ids]
    usage = pb.Usage(prompt_tokens=2, cached_tokens=1, completion_tokens=99)
    return pb.StreamGenerateResponse(
        index=index, token_ids=ids, logprobs=logprobs, finish_reason=reason, usage=usage, **more
    )


def written(parts: list[pb.StreamGenerateResponse], stream: bool, **params: Any) -> list[vllm.GenerateResponse]:
    writer = ResponseWriter(vllm.GenerateRequest(stream=stream, sampling_params=vllm.SamplingParams(**params)))
    return [message for each in parts for message in writer.write(each)] + list(writer.finish())


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[dict[int, list[int]], list[pb.StreamGenerateResponse]]:
    """The tokens of each candidate, and the parts in which they came, candidates mixed, each part with any number."""
    tokens: dict[int, list[int]] = {}
    queues = []
    for index in range(draw(st.integers(1, 4))):
        pieces = draw(st.lists(st.lists(st.integers(0, 50), max_size=4), max_size=5))
        tokens[index] = [token for piece in pieces for token in piece]
        queues.append([part(index, piece) for piece in pieces] + [part(index, [], LENGTH)])
    parts = []
    while queues:
        queue = draw(st.sampled_from(queues))
        parts.append(queue.pop(0))
        queues = [each for each in queues if each]
    parts[0].prompt_logprobs.extend(PROMPT)
    return tokens, parts


@given(deliveries())
def test_chunks_add_up_and_every_candidate_completes_once(case: Any) -> None:
    tokens, parts = case
    joined: dict[int, list[int]] = {index: [] for index in tokens}
    logprobs: dict[int, list[int]] = {index: [] for index in tokens}
    prompts, completed = dict.fromkeys(tokens, 0), set()
    for message in written(parts, stream=True):
        kind = message.WhichOneof("response")
        body = getattr(message, kind)
        assert body.index not in completed
        assert (body.prompt_tokens, body.cached_tokens) == (2, 1)
        prompts[body.index] += body.HasField("input_logprobs")
        if kind == "chunk":
            assert body.token_ids
            assert body.completion_tokens == len(body.token_ids)
            joined[body.index] += body.token_ids
            logprobs[body.index] += body.output_logprobs.token_ids
        else:
            assert list(body.output_ids) == joined[body.index]
            assert body.completion_tokens == len(body.output_ids)
            assert not body.HasField("output_logprobs")
            completed.add(body.index)
    assert joined == logprobs == tokens
    assert completed == set(tokens)
    assert set(prompts.values()) == {1}


@given(deliveries())
def test_an_answer_at_once_is_one_message_per_candidate_in_order(case: Any) -> None:
    tokens, parts = case
    messages = written(parts, stream=False)
    assert [message.complete.index for message in messages] == list(tokens)
    for message in messages:
        complete = message.complete
        assert list(complete.output_ids) == tokens[complete.index] == list(complete.output_logprobs.token_ids)
        assert complete.finish_reason == "length"
        assert list(complete.input_logprobs.token_ids) == [8, 9]


@pytest.mark.parametrize(("reason", "said"), [(STOP, "stop"), (LENGTH, "length"), (ABORTED, "abort")])
@pytest.mark.parametrize("stream", [True, False])
def test_finish_reasons(reason: Any, said: str, stream: bool) -> None:
    assert written([part(0, [4], reason)], stream)[-1].complete.finish_reason == said


@pytest.mark.parametrize("stream", [True, False])
def test_an_end_of_text_is_no_matched_stop_but_what_the_request_named_is(stream: bool) -> None:
    def matched(**more: Any) -> vllm.GenerateComplete:
        return written([part(0, [4], STOP, **more)], stream, stop_token_ids=[4], stop=["x"])[-1].complete

    assert matched(stop_token_id=2).WhichOneof("matched_stop") is None
    assert matched(stop_token_id=4).matched_token_id == 4
    assert matched(stop_string="x").matched_stop_str == "x"


def test_nothing_drawn_is_a_complete_without_a_chunk() -> None:
    (message,) = written([part(0, [], ABORTED)], stream=True)
    assert message.complete.finish_reason == "abort"


def test_top_logprobs_come_beside_each_token() -> None:
    row = pb.TokenLogprobs(token_id=3, logprob=-1, top_token_ids=[6, 3], top_logprobs=[-0.5, -1])
    told = output_logprobs([row, row])
    assert list(told.token_logprobs) == [-1, -1]
    assert [list(top.token_ids) for top in told.top_logprobs] == [[6, 3], [6, 3]]
    assert [list(top.values) for top in told.top_logprobs] == [[-0.5, -1], [-0.5, -1]]


def test_logprobs_of_the_whole_vocabulary_get_their_ids() -> None:
    told = output_logprobs([pb.TokenLogprobs(token_id=1, logprob=-1, top_logprobs=[-2, -1, -3])])
    assert list(told.top_logprobs[0].token_ids) == [0, 1, 2]


def test_without_top_logprobs_there_are_none() -> None:
    assert not output_logprobs([pb.TokenLogprobs(token_id=1, logprob=-1)]).top_logprobs
    assert output_logprobs([]) is None


def test_the_first_token_of_a_prompt_has_a_place_but_no_value() -> None:
    top = pb.TokenLogprobs(token_id=9, logprob=-0.5, top_token_ids=[7], top_logprobs=[-0.25])
    told = input_logprobs([pb.TokenLogprobs(token_id=8), top])
    assert list(told.token_ids) == [8, 9]
    assert [each.HasField("value") for each in told.token_logprobs] == [False, True]
    assert [list(each.token_ids) for each in told.top_logprobs] == [[], [7]]
