"""Every field of a GenerateRequest: what is refused, by which name, and what an unset one means."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from grokmoe.errors import FailedPrecondition, InvalidRequest
from grokmoe.tokenizer import Tokenizer
from grokmoe.v1 import generation_pb2 as pb
from router import validation
from router.sequence import SamplingSettings
from router.validation import to_request
from tests import goldens

CONFIG = dataclasses.replace(goldens.config(), context_length=16)


def word_tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend)


TOKENIZER = word_tokenizer()


def proto(**fields: Any) -> Any:
    if "text" not in fields and "token_ids" not in fields:
        fields["token_ids"] = pb.TokenIds(ids=[1, 2])
    return pb.GenerateRequest(**fields)


def sampling(**fields: Any) -> Any:
    return proto(sampling=pb.SamplingParams(**fields))


def stopping(**fields: Any) -> Any:
    return proto(stopping=pb.StoppingParams(**fields))


@pytest.mark.parametrize(
    ("request_", "field", "words"),
    [
        (proto(request_id="x" * 129), "request_id", ("129", "128")),
        (pb.GenerateRequest(), "prompt", ("text or token_ids",)),
        (proto(text=""), "text", ("empty",)),
        (proto(text=" "), "text", ("empty",)),
        (proto(text="a " * 16), "text", ("16 tokens", "context of 16", "15")),
        (proto(token_ids=pb.TokenIds()), "token_ids.ids", ("empty",)),
        (proto(token_ids=pb.TokenIds(ids=[1, 512])), "token_ids.ids", ("512", "vocabulary size 512")),
        (proto(token_ids=pb.TokenIds(ids=[1] * 16)), "token_ids.ids", ("16 tokens", "15")),
        (sampling(temperature=-0.5), "sampling.temperature", ("-0.5", "[0, 100]")),
        (sampling(temperature=101), "sampling.temperature", ("101", "100")),
        (sampling(temperature=float("nan")), "sampling.temperature", ("nan",)),
        (sampling(temperature=float("inf")), "sampling.temperature", ("inf",)),
        (sampling(top_p=0), "sampling.top_p", ("0.0", "(0, 1]")),
        (sampling(top_p=1.5), "sampling.top_p", ("1.5", "(0, 1]")),
        (sampling(top_p=float("nan")), "sampling.top_p", ("nan",)),
        (stopping(max_tokens=0), "stopping.max_tokens", ("0", "at least 1")),
        (stopping(stop_token_ids=[512]), "stopping.stop_token_ids", ("512", "vocabulary size 512")),
        (stopping(stop_token_ids=range(65)), "stopping.stop_token_ids", ("65", "64")),
    ],
)
def test_what_is_refused_names_field_value_and_limit(request_: Any, field: str, words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        to_request(request_, CONFIG, TOKENIZER)
    assert caught.value.field == field
    for word in words:
        assert word in caught.value.message


def test_a_text_may_be_too_long_to_be_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "MAX_TEXT_BYTES", 5)
    with pytest.raises(InvalidRequest, match="text: has 6 bytes, limit is 5"):
        to_request(proto(text="äöü"), CONFIG, TOKENIZER)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(FailedPrecondition, match="token_ids"):
        to_request(proto(text="a"), CONFIG, None)
    assert to_request(proto(), CONFIG, None).prompt_ids == (1, 2)


def test_defaults() -> None:
    request = to_request(proto(), CONFIG, TOKENIZER)
    assert request.max_tokens == 128
    assert request.stop_ids == frozenset(CONFIG.eos_token_ids) == {2}
    assert not request.logits
    assert request.sampling == SamplingSettings(temperature=1.0, top_k=0, top_p=1.0, seed=request.sampling.seed)
    other = to_request(proto(), CONFIG, TOKENIZER)
    assert request.request_id
    assert (request.request_id, request.sampling.seed) != (other.request_id, other.sampling.seed), "drawn"


def test_what_is_set_is_taken() -> None:
    request = to_request(
        pb.GenerateRequest(
            request_id="mine",
            text="b a b",
            sampling=pb.SamplingParams(temperature=0, top_k=3, top_p=0.5, seed=2**64 - 1),
            stopping=pb.StoppingParams(max_tokens=7, stop_token_ids=[5, 6, 5], ignore_eos=True),
        ),
        CONFIG,
        TOKENIZER,
    )
    assert (request.request_id, request.prompt_ids, request.max_tokens) == ("mine", (2, 1, 2), 7)
    assert request.sampling == SamplingSettings(temperature=0.0, top_k=3, top_p=0.5, seed=2**64 - 1)
    assert request.stop_ids == {5, 6}
    assert to_request(stopping(stop_token_ids=[5]), CONFIG, None).stop_ids == {2, 5}


def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    assert len(to_request(proto(token_ids=pb.TokenIds(ids=[0] * 15)), CONFIG, None).prompt_ids) == 15
