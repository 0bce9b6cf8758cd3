"""Requests of vLLM's service become requests of ours; what cannot be honoured is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("smg_grpc_proto")

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from grokmoe.errors import InvalidRequest, Reason
from grokmoe.v1 import generation_pb2 as pb
from router.vllm_engine.request import their_error, to_generate_request

CONTEXT = 100


def translate(stream: bool = False, ids: tuple[int, ...] = (5, 6, 7), **params: Any) -> pb.GenerateRequest:
    request = vllm.GenerateRequest(
        request_id="a",
        tokenized=vllm.TokenizedInput(original_text="unused", input_ids=ids),
        sampling_params=vllm.SamplingParams(**params),
        stream=stream,
    )
    return to_generate_request(request, CONTEXT)


def refused(request: vllm.GenerateRequest) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        to_generate_request(request, CONTEXT)
    return caught.value


def test_zero_means_unset() -> None:
    ours = translate()
    assert ours.request_id == "a"
    assert list(ours.token_ids.ids) == [5, 6, 7]
    assert not ours.tokenize.ByteSize()
    for name in ("temperature", "top_p", "repetition_penalty", "n", "seed"):
        assert not ours.sampling.HasField(name), name
    assert ours.stopping.max_tokens == CONTEXT - 3
    assert not ours.HasField("structured")
    assert not ours.response.HasField("logprobs")
    assert not ours.response.HasField("prompt_logprobs")
    assert ours.response.HasField("text")
    assert not ours.response.text


def test_a_value_of_zero_that_is_optional_is_kept() -> None:
    ours = translate(temperature=0, max_tokens=0, logprobs=0, prompt_logprobs=0, seed=0)
    assert ours.sampling.HasField("temperature")
    assert ours.stopping.max_tokens == 0
    assert ours.response.HasField("logprobs")
    assert ours.response.HasField("prompt_logprobs")
    assert ours.sampling.HasField("seed")


def test_every_field_arrives() -> None:
    ours = translate(
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        frequency_penalty=-1,
        presence_penalty=1.5,
        repetition_penalty=1.25,
        max_tokens=9,
        min_tokens=2,
        stop=["x", "yz"],
        stop_token_ids=[3],
        skip_special_tokens=True,
        spaces_between_special_tokens=True,
        ignore_eos=True,
        n=3,
        logprobs=-1,
        prompt_logprobs=4,
        seed=11,
        include_stop_str_in_output=True,
        logit_bias={4: -2.5, 9: 1},
        grammar_from_first_token=True,
    )
    expected = pb.GenerateRequest(
        request_id="a",
        token_ids=pb.TokenIds(ids=[5, 6, 7]),
        sampling=pb.SamplingParams(
            temperature=0.5,
            top_p=0.25,
            top_k=7,
            min_p=0.125,
            frequency_penalty=-1,
            presence_penalty=1.5,
            repetition_penalty=1.25,
            n=3,
            seed=11,
            logit_bias={4: -2.5, 9: 1},
        ),
        stopping=pb.StoppingParams(
            max_tokens=9,
            min_tokens=2,
            stop_strings=["x", "yz"],
            stop_token_ids=[3],
            ignore_eos=True,
            include_stop_string=True,
        ),
        response=pb.ResponseOptions(logprobs=-1, prompt_logprobs=4, skip_special_tokens=True, text=False),
    )
    assert ours == expected


@pytest.mark.parametrize(
    ("given_as", "ours"),
    [
        ({"json_schema": '{"type": "object"}'}, pb.StructuredOutput(json_schema='{"type": "object"}')),
        ({"json_object": True}, pb.StructuredOutput(json_object=True)),
        ({"regex": "a+"}, pb.StructuredOutput(regex="a+")),
        ({"grammar": 'start: "a"'}, pb.StructuredOutput(grammar='start: "a"')),
        (
            {"choice": vllm.ChoiceConstraint(choices=["yes", "no"])},
            pb.StructuredOutput(choice=pb.Choices(choices=["yes", "no"])),
        ),
        ({"choice": vllm.ChoiceConstraint()}, pb.StructuredOutput(choice=pb.Choices())),
        ({"json_object": False}, pb.StructuredOutput(json_object=False)),
    ],
)
def test_constraints(given_as: dict[str, Any], ours: pb.StructuredOutput) -> None:
    """Also one that makes no sense arrives: it is refused where all values are checked, not taken for no constraint."""
    assert translate(**given_as).structured == ours


def test_text_is_tokenised_by_the_server() -> None:
    request = vllm.GenerateRequest(text="hello", sampling_params=vllm.SamplingParams(max_tokens=4))
    ours = to_generate_request(request, CONTEXT)
    assert ours.text == "hello"
    assert ours.stopping.max_tokens == 4


@pytest.mark.parametrize(("seed", "ours"), [(0, 0), (7, 7), (-2, 2**64 - 2), (-(2**31), 2**64 - 2**31)])
def test_seeds(seed: int, ours: int) -> None:
    assert translate(seed=seed).sampling.seed == ours


def test_seed_minus_one_is_none() -> None:
    assert not translate(seed=-1).sampling.HasField("seed")


@given(st.lists(st.integers(0, 50), min_size=1, max_size=150), st.integers(1, CONTEXT - 1))
def test_prompts_are_truncated_from_the_left(ids: list[int], num_tokens: int) -> None:
    ours = translate(ids=tuple(ids), truncate_prompt_tokens=num_tokens)
    assert list(ours.token_ids.ids) == ids[-num_tokens:]
    assert ours.stopping.max_tokens == max(1, CONTEXT - min(len(ids), num_tokens))


def test_truncation_to_the_context_leaves_room_for_a_token() -> None:
    ours = translate(ids=tuple(range(150)), truncate_prompt_tokens=-1)
    assert list(ours.token_ids.ids) == list(range(150))[-(CONTEXT - 1) :]
    assert ours.stopping.max_tokens == 1


@pytest.mark.parametrize("num_tokens", [0, -2, CONTEXT])
def test_impossible_truncation(num_tokens: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"truncate_prompt_tokens: is {num_tokens}"):
        translate(truncate_prompt_tokens=num_tokens)


TOKENS = vllm.TokenizedInput(input_ids=[1])


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("kv_transfer_params", {"kv_transfer_params": vllm.KvTransferParams()}),
        ("kv_transfer_params_json", {"kv_transfer_params_json": ""}),
        ("mm_inputs", {"mm_inputs": vllm.MultimodalInputs()}),
        ("extra_mm_inputs", {"extra_mm_inputs": [vllm.MultimodalInputs()]}),
        ("media_refs", {"media_refs": vllm.MediaRefs()}),
        ("data_parallel_rank", {"data_parallel_rank": 1}),
        ("sampling_params.structural_tag", {"sampling_params": vllm.SamplingParams(structural_tag="{}")}),
        ("sampling_params.logit_bias", {"sampling_params": vllm.SamplingParams(logit_bias={-1: 1})}),
    ],
)
def test_what_cannot_be_honoured_is_refused(field: str, changes: dict[str, Any]) -> None:
    assert refused(vllm.GenerateRequest(tokenized=TOKENS, **changes)).field == field


def test_rank_zero_is_the_only_one_and_may_be_named() -> None:
    assert to_generate_request(vllm.GenerateRequest(tokenized=TOKENS, data_parallel_rank=0), CONTEXT).token_ids.ids == [
        1
    ]


def test_text_cannot_be_truncated() -> None:
    request = vllm.GenerateRequest(text="a", sampling_params=vllm.SamplingParams(truncate_prompt_tokens=2))
    assert refused(request).field == "sampling_params.truncate_prompt_tokens"


def test_no_field_of_their_messages_is_forgotten() -> None:
    """Set alone, each field either changes what we do, or is refused, or is listed here with its reason."""
    without_effect = {
        "stream",  # of the answer
        "sampling_params.spaces_between_special_tokens",  # of text, and ids are returned
        "sampling_params.include_stop_str_in_output",  # without stop strings
        "sampling_params.grammar_from_first_token",  # is so always
    }
    tokens = vllm.TokenizedInput(input_ids=[1, 2, 3])
    plain = to_generate_request(vllm.GenerateRequest(tokenized=tokens), CONTEXT)
    unchanged = set()
    for message, path in ((vllm.GenerateRequest, ""), (vllm.SamplingParams, "sampling_params.")):
        for field in message.DESCRIPTOR.fields:
            if field.name in ("tokenized", "sampling_params"):
                continue
            request = vllm.GenerateRequest(tokenized=tokens)
            _set_something(request.sampling_params if path else request, field)
            try:
                if to_generate_request(request, CONTEXT) == plain:
                    unchanged.add(path + field.name)
            except InvalidRequest:
                pass
    assert unchanged == without_effect


def _set_something(message: Any, field: Any) -> None:
    if field.name == "logit_bias":
        message.logit_bias[1] = 1
    elif field.is_repeated:
        container = getattr(message, field.name)
        if field.message_type:
            container.add()
        else:
            container.append("a" if field.cpp_type == field.CPPTYPE_STRING else 1)
    elif field.message_type:
        getattr(message, field.name).SetInParent()
    elif field.cpp_type == field.CPPTYPE_STRING:
        setattr(message, field.name, "a")
    else:
        setattr(message, field.name, 1)


def test_a_field_from_the_future_is_refused() -> None:
    request = vllm.GenerateRequest(tokenized=TOKENS)
    request.sampling_params.MergeFromString(b"\xc0\x3e\x01")  # field 1000, a varint
    assert refused(vllm.GenerateRequest.FromString(request.SerializeToString())).field == "sampling_params.1000"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("sampling.top_p", "sampling_params.top_p"),
        ("stopping.stop_strings[2]", "sampling_params.stop[2]"),
        ("stopping.include_stop_string", "sampling_params.include_stop_str_in_output"),
        ("stopping.max_tokens", "sampling_params.max_tokens"),
        ("response.logprobs", "sampling_params.logprobs"),
        ("structured.json_schema", "sampling_params.json_schema"),
        ("structured", "sampling_params"),
        ("token_ids.ids", "tokenized.input_ids"),
        ("prompt", "input"),
        ("text", "text"),
        ("request_id", "request_id"),
        ("data_parallel_rank", "data_parallel_rank"),
    ],
)
def test_errors_name_their_fields(ours: str, theirs: str) -> None:
    error = their_error(InvalidRequest(ours, "is wrong", reason=Reason.CONFLICTING_FIELDS))
    assert (error.field, error.message, error.reason) == (theirs, f"{theirs}: is wrong", Reason.CONFLICTING_FIELDS)
