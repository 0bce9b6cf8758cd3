"""Options of a call: what is set goes over the wire as it is, what is unset stays unset."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import grokmoe
from grokmoe.options import build_request, build_score_request, build_tokenize_request
from grokmoe.v1 import generation_pb2 as pb
from grokmoe.v1 import tensor_pb2
from tests.shared.client_calls import ask_async, ask_sync
from tests.shared.fake_generation import FakeServer

EVERY_OPTION: dict[str, Any] = {
    "max_tokens": 5,
    "min_tokens": 2,
    "n": 3,
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.75,
    "min_p": 0.125,
    "seed": 2**64 - 1,
    "repetition_penalty": 1.5,
    "frequency_penalty": -0.5,
    "presence_penalty": 0.25,
    "logit_bias": {3: -1.5, 4: 2.0},
    "stop": ["a", "b,c"],
    "include_stop_string": True,
    "stop_token_ids": (7,),
    "ignore_eos": True,
    "logprobs": -1,
    "prompt_logprobs": 2,
    "echo": True,
    "skip_special_tokens": False,
    "text": False,
    "resumed": [5, 6],
    "add_bos": True,
    "refuse_control_symbols": True,
    "request_id": "mine",
}
"""One value of each, but of the structured ones, of which there can be one only."""

WHOLE_REQUEST = pb.GenerateRequest(
    request_id="mine",
    text="hello",
    sampling=pb.SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=0.75,
        seed=2**64 - 1,
        min_p=0.125,
        repetition_penalty=1.5,
        frequency_penalty=-0.5,
        presence_penalty=0.25,
        logit_bias={3: -1.5, 4: 2.0},
        n=3,
    ),
    stopping=pb.StoppingParams(
        max_tokens=5,
        stop_token_ids=[7],
        ignore_eos=True,
        min_tokens=2,
        stop_strings=["a", "b,c"],
        include_stop_string=True,
    ),
    response=pb.ResponseOptions(logprobs=-1, prompt_logprobs=2, echo=True, skip_special_tokens=False, text=False),
    tokenize=pb.TokenizeOptions(add_bos=True, refuse_control_symbols=True),
    resumed=pb.TokenIds(ids=[5, 6]),
)


STRUCTURED = {"json_schema", "json_object", "regex", "grammar", "choice"}


def test_every_option_reaches_its_field() -> None:
    assert EVERY_OPTION.keys() | STRUCTURED == grokmoe.GenerateOptions.__annotations__.keys()
    assert build_request("hello", **EVERY_OPTION) == WHOLE_REQUEST


def test_every_field_has_an_option() -> None:
    """A field that the contract gains must not be forgotten here."""
    for name in ("sampling", "stopping", "response", "tokenize"):
        message = getattr(WHOLE_REQUEST, name)
        assert {field.name for field, _ in message.ListFields()} == {field.name for field in message.DESCRIPTOR.fields}
    formats = pb.StructuredOutput.DESCRIPTOR.oneofs_by_name["format"].fields
    assert {field.name for field in formats} == STRUCTURED
    assert {field.name for field, _ in WHOLE_REQUEST.ListFields()} | {"token_ids", "inputs_embeds", "structured"} == {
        field.name for field in pb.GenerateRequest.DESCRIPTOR.fields
    }


@pytest.mark.parametrize("ask", [ask_sync, ask_async])
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_options_go_over_the_wire(ask: Any, method: str) -> None:
    unset = dict.fromkeys(grokmoe.GenerateOptions.__annotations__)
    empty = {"stop_token_ids": (), "stop": [], "logit_bias": {}, "json_object": False, "resumed": []}
    zeros = {"temperature": 0.0, "top_k": 0, "top_p": 0.0, "seed": 0, "min_p": 0.0}
    with FakeServer() as server:
        ask(server.address, method, "hello")
        ask(server.address, method, "hello", **{**unset, **empty})
        ask(server.address, method, "", max_tokens=0, ignore_eos=False, logprobs=0, add_bos=False, **zeros)
        ask(server.address, method, (1, 2), request_id="mine")
        ask(server.address, method, [])
        ask(server.address, method, "hello", **EVERY_OPTION)
        first, second, third, fourth, fifth, sixth = server.generation.requests
    for request in (first, second):
        assert request.SerializeToString() == pb.GenerateRequest(text="hello").SerializeToString()
    assert third == pb.GenerateRequest(
        text="",
        sampling=pb.SamplingParams(**zeros),
        stopping=pb.StoppingParams(max_tokens=0, ignore_eos=False),
        response=pb.ResponseOptions(logprobs=0),
        tokenize=pb.TokenizeOptions(add_bos=False),
    )
    assert fourth == pb.GenerateRequest(request_id="mine", token_ids=pb.TokenIds(ids=[1, 2]))
    assert fifth.WhichOneof("prompt") == "token_ids"  # an empty list is left to the server
    assert sixth == WHOLE_REQUEST


@pytest.mark.parametrize(
    ("options", "structured"),
    [
        ({"json_schema": {"type": "object"}}, {"json_schema": '{"type": "object"}'}),
        ({"json_schema": '{"type":"array"}'}, {"json_schema": '{"type":"array"}'}),
        ({"json_object": True}, {"json_object": True}),
        ({"regex": "[0-9]+"}, {"regex": "[0-9]+"}),
        ({"regex": ""}, {"regex": ""}),
        ({"grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
        ({"choice": ["yes", "no"]}, {"choice": pb.Choices(choices=["yes", "no"])}),
        ({"choice": []}, {"choice": pb.Choices()}),
        ({"regex": "a", "json_object": False}, {"regex": "a"}),
    ],
)
def test_structured_output(options: dict[str, Any], structured: dict[str, Any]) -> None:
    request = build_request("x", **options)
    assert request == pb.GenerateRequest(text="x", structured=pb.StructuredOutput(**structured))


@given(st.sets(st.sampled_from(sorted(STRUCTURED)), min_size=2))
def test_structured_outputs_exclude_each_other(names: set[str]) -> None:
    values = {"json_schema": {}, "json_object": True, "regex": "a", "grammar": "g", "choice": ["a"]}
    with pytest.raises(grokmoe.InvalidRequest, match="cannot be combined") as caught:
        build_request("x", **{name: values[name] for name in names})  # type: ignore[misc]
    assert (caught.value.field, caught.value.reason) == ("structured", grokmoe.Reason.CONFLICTING_FIELDS)
    assert all(name in caught.value.message for name in names)


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists)))
def test_a_schema_survives_the_way(schema: Any) -> None:
    assert json.loads(build_request("x", json_schema=schema).structured.json_schema) == schema


class TestEmbeds:
    def test_arrays_and_bytes(self) -> None:
        numbers = [1.0, -2.0, 0.5, 3.0, 0.0, 7.0]
        data = struct.pack("<6f", *numbers)
        prompt = grokmoe.Embeds(data, (2, 3))
        message = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2, 3], data=data)
        assert build_request(prompt) == pb.GenerateRequest(inputs_embeds=message)
        assert grokmoe.Embeds.of(np.array(numbers, np.float32).reshape(2, 3)) == prompt
        assert grokmoe.Embeds.of(np.array(numbers, np.float32).reshape(3, 2).T).data != data
        assert grokmoe.Embeds.of(np.asfortranarray(np.array(numbers, np.float32).reshape(2, 3))) == prompt

    def test_bfloat16_by_its_bits(self) -> None:
        bits = np.array([[0x3F80, 0xC000]], np.uint16)
        prompt = grokmoe.Embeds.of(bits, "bfloat16")
        assert prompt == grokmoe.Embeds(b"\x80\x3f\x00\xc0", (1, 2), "bfloat16")
        assert build_request(prompt).inputs_embeds.dtype == tensor_pb2.DATA_TYPE_BFLOAT16

    @pytest.mark.parametrize(
        ("make", "error", "words"),
        [
            (lambda: grokmoe.Embeds(b"", (1, 2)), ValueError, "has 0 bytes, shape .* needs 8"),
            (lambda: grokmoe.Embeds(bytes(8), (1, 2), "float64"), ValueError, "'float64', must be one of"),
            (lambda: grokmoe.Embeds.of(np.ones(3, np.float32)), ValueError, "1 dimensions"),
            (lambda: grokmoe.Embeds.of(np.ones((2, 3))), TypeError, "items 'd'"),
            (lambda: grokmoe.Embeds.of(np.ones((2, 3), np.int32)), TypeError, "items 'i'"),
            (lambda: grokmoe.Embeds.of(np.ones((2, 3), np.float32), "bfloat16"), TypeError, "items of 4 bytes"),
            (lambda: grokmoe.Embeds.of(np.ones((2, 3), ">f4")), TypeError, "'>f'"),
            (lambda: build_score_request(grokmoe.Embeds(bytes(8), (1, 2))), TypeError, "score"),
        ],
    )
    def test_what_is_none(self, make: Any, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            make()

    def test_numbers_do_not_fill_the_log(self) -> None:
        assert "data" not in repr(grokmoe.Embeds(bytes(8), (1, 2)))

    @pytest.mark.parametrize("ask", [ask_sync, ask_async])
    @pytest.mark.parametrize("method", ["generate", "stream"])
    def test_over_the_wire(self, ask: Any, method: str) -> None:
        prompt = grokmoe.Embeds(bytes(range(16)), (2, 2))
        with FakeServer() as server:
            ask(server.address, method, prompt)
            (request,) = server.generation.requests
        assert request == pb.GenerateRequest(inputs_embeds=prompt.to_message())


def test_one_stop_string_is_not_its_letters() -> None:
    assert list(build_request("x", stop="abc").stopping.stop_strings) == ["abc"]


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("x", {"max_tokens": -1}, "stopping.max_tokens"),
        ("x", {"top_k": 2**32}, "sampling.top_k"),
        ("x", {"seed": -1}, "sampling.seed"),
        ("x", {"n": -1}, "sampling.n"),
        ("x", {"logit_bias": {-1: 1.0}}, "sampling.logit_bias"),
        ("x", {"logprobs": 2**31}, "response.logprobs"),
        ("x", {"stop_token_ids": [-1]}, "stopping.stop_token_ids"),
        ("x", {"resumed": [2**32]}, "resumed.ids"),
        ("x", {"stop": "\ud800"}, "stopping.stop_strings"),
        ("x", {"regex": "\ud800"}, "structured.regex"),
        ("x", {"json_schema": {"minimum": float("nan")}}, "structured.json_schema"),
        ([1, -1], {}, "token_ids"),
        ("\ud800", {}, "text"),
    ],
)
@pytest.mark.parametrize("ask", [ask_sync, ask_async])
def test_what_no_message_can_carry(ask: Any, prompt: Any, options: Any, field: str) -> None:
    with pytest.raises(grokmoe.InvalidRequest) as caught:
        ask("127.0.0.1:1", "generate", prompt, **options)  # nobody is there
    assert caught.value.field == field


@pytest.mark.parametrize(
    "options", [{"choice": "yes"}, {"temperature": "hot"}, {"stop": 5}, {"logit_bias": {1: "x"}}, {"regex": 1}]
)
def test_values_of_another_type(options: Any) -> None:
    with pytest.raises(TypeError):
        build_request("x", **options)


def test_options_of_the_other_calls() -> None:
    assert build_score_request([1], top_logprobs=-1, request_id="a") == pb.ScoreRequest(
        request_id="a", token_ids=pb.TokenIds(ids=[1]), top_logprobs=-1
    )
    assert build_score_request("x", add_bos=True, refuse_control_symbols=False) == pb.ScoreRequest(
        text="x", tokenize=pb.TokenizeOptions(add_bos=True, refuse_control_symbols=False)
    )
    assert build_tokenize_request("x") == pb.TokenizeRequest(text="x")
    assert build_tokenize_request("x", add_bos=True) == pb.TokenizeRequest(
        text="x", options=pb.TokenizeOptions(add_bos=True)
    )
    with FakeServer() as server:
        ask_sync(server.address, "detokenize", [97])
        ask_sync(server.address, "detokenize", [97], skip_special_tokens=False)
        assert server.generation.requests == [
            pb.DetokenizeRequest(token_ids=[97]),
            pb.DetokenizeRequest(token_ids=[97], skip_special_tokens=False),
        ]
    with pytest.raises(TypeError, match="max_tokens"):
        build_score_request("x", max_tokens=5)  # type: ignore[call-arg]
