"""Every field of GenerateRequest and ScoreRequest: what is refused, by which name, and what an unset one means."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from grokmoe.errors import FailedPrecondition, InvalidRequest, Reason
from grokmoe.tokenizer import Tokenizer
from grokmoe.v1 import generation_pb2 as pb
from router.request import Request, SamplingSettings
from router.structured import GrammarCompiler
from router.text import TextSettings
from router.validation import Accepted, PromptReader, RequestReader, prompt
from tests import goldens

CONFIG = dataclasses.replace(goldens.config(), context_length=16, bos_token_id=None)


def word_tokenizer() -> Tokenizer:
    words = ["<unk>", "a", "b", "<|mark|>"]
    backend = tokenizers.Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend)


TOKENIZER = word_tokenizer()


def reader(tokenizer: Tokenizer | None = TOKENIZER, **changes: Any) -> RequestReader:
    config = dataclasses.replace(CONFIG, **changes)
    compiler = GrammarCompiler(tokenizer, config.vocab_size, config.eos_token_ids) if tokenizer else None
    return RequestReader(config, PromptReader(config, tokenizer), compiler)


def accept(proto: Any, tokenizer: Tokenizer | None = TOKENIZER, **changes: Any) -> Accepted:
    return asyncio.run(reader(tokenizer, **changes).generate(proto))


def to_request(proto: Any, tokenizer: Tokenizer | None = TOKENIZER) -> Request:
    return accept(proto, tokenizer).request


def proto(**fields: Any) -> Any:
    if "text" not in fields and "token_ids" not in fields:
        fields["token_ids"] = pb.TokenIds(ids=[1, 2])
    return pb.GenerateRequest(**fields)


def sampling(**fields: Any) -> Any:
    return proto(sampling=pb.SamplingParams(**fields))


def stopping(**fields: Any) -> Any:
    return proto(stopping=pb.StoppingParams(**fields))


def response(**fields: Any) -> Any:
    return proto(response=pb.ResponseOptions(**fields))


def structured(**fields: Any) -> Any:
    return proto(structured=pb.StructuredOutput(**fields))


NAN, INF = float("nan"), float("inf")
TOKENIZE, BOS = pb.TokenizeOptions(refuse_control_symbols=True), pb.TokenizeOptions(add_bos=True)
UNKNOWN_FIELD = b"\xa0\x06\x01"  # field 100, a number


def unknown(message: Any) -> Any:
    message.MergeFromString(UNKNOWN_FIELD)
    return message


@pytest.mark.parametrize(
    ("request_", "field", "words"),
    [
        (proto(request_id="x" * 129), "request_id", ("129", "128")),
        (pb.GenerateRequest(), "prompt", ("text, token_ids or inputs_embeds",)),
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
        (sampling(top_p=0), "sampling.top_p", ("is 0,", "(0, 1]")),
        (sampling(top_p=1.5), "sampling.top_p", ("1.5", "(0, 1]")),
        (sampling(top_p=float("nan")), "sampling.top_p", ("nan",)),
        (stopping(max_tokens=0), "stopping.max_tokens", ("0", "at least 1")),
        (stopping(stop_token_ids=[512]), "stopping.stop_token_ids", ("512", "vocabulary size 512")),
        (stopping(stop_token_ids=range(65)), "stopping.stop_token_ids", ("65", "64")),
        (sampling(min_p=1.5), "sampling.min_p", ("1.5", "[0, 1]")),
        (sampling(min_p=NAN), "sampling.min_p", ("nan",)),
        (sampling(repetition_penalty=0), "sampling.repetition_penalty", ("is 0,", "(0, 10]")),
        (sampling(repetition_penalty=INF), "sampling.repetition_penalty", ("inf", "(0, 10]")),
        (sampling(frequency_penalty=-2.5), "sampling.frequency_penalty", ("-2.5", "[-2, 2]")),
        (sampling(presence_penalty=3), "sampling.presence_penalty", ("3", "[-2, 2]")),
        (sampling(logit_bias={512: 1.0}), "sampling.logit_bias", ("512", "vocabulary size 512")),
        (sampling(logit_bias={5: -101.0}), "sampling.logit_bias", ("-101", "token 5", "[-100, 100]")),
        (sampling(logit_bias={5: NAN}), "sampling.logit_bias", ("nan",)),
        (sampling(logit_bias=dict.fromkeys(range(1025), 1.0)), "sampling.logit_bias", ("1025", "1024")),
        (sampling(n=0), "sampling.n", ("is 0", "[1, 64]")),
        (sampling(n=65), "sampling.n", ("65", "64")),
        (stopping(min_tokens=5, max_tokens=4), "stopping.min_tokens", ("5", "4")),
        (stopping(stop_strings=["x"] * 17), "stopping.stop_strings", ("17", "16")),
        (stopping(stop_strings=["x", ""]), "stopping.stop_strings[1]", ("0 characters", "1 to 256")),
        (stopping(stop_strings=["x" * 257]), "stopping.stop_strings[0]", ("257", "256")),
        (stopping(include_stop_string=True), "stopping.include_stop_string", ("no stop_strings",)),
        (response(logprobs=-2), "response.logprobs", ("-2", "[-1, 512]")),
        (response(prompt_logprobs=513), "response.prompt_logprobs", ("513", "512")),
        (response(echo=True, text=False), "response.echo", ("response.text is false",)),
        (proto(text="<|mark|> a", tokenize=TOKENIZE), "text", ("<|mark|>",)),
        (proto(tokenize=TOKENIZE), "tokenize", ("token_ids",)),
        (proto(text="a", tokenize=BOS), "tokenize.add_bos", ("begin-of-sequence",)),
        (structured(), "structured", ("empty",)),
        (structured(json_object=False), "structured.json_object", ("false",)),
        (structured(regex="("), "structured.regex", ()),
        (structured(json_schema="{"), "structured.json_schema", ()),
        (structured(choice=pb.Choices()), "structured.choice", ("at least one",)),
        (structured(regex="a" * 65537), "structured.regex", ("65537", "65536")),
        (
            proto(structured=pb.StructuredOutput(regex="a"), stopping=pb.StoppingParams(min_tokens=1)),
            "stopping.min_tokens",
            ("structured",),
        ),
        (
            proto(structured=pb.StructuredOutput(regex="a"), stopping=pb.StoppingParams(ignore_eos=True)),
            "stopping.ignore_eos",
            ("structured",),
        ),
        (unknown(proto()), "100", ("does not know",)),
        (proto(sampling=unknown(pb.SamplingParams())), "sampling.100", ("does not know",)),
    ],
)
def test_what_is_refused_names_field_value_and_limit(request_: Any, field: str, words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        to_request(request_)
    assert caught.value.field == field
    for word in words:
        assert word in caught.value.message


def test_a_text_may_be_too_long_to_be_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "MAX_TEXT_BYTES", 5)
    with pytest.raises(InvalidRequest, match="text: has 6 bytes, limit is 5"):
        to_request(proto(text="äöü"))


@pytest.mark.parametrize(
    "request_",
    [
        proto(text="a"),
        stopping(stop_strings=["x"]),
        response(echo=True),
        structured(regex="a"),
    ],
)
def test_what_needs_a_tokenizer(request_: Any) -> None:
    with pytest.raises(FailedPrecondition, match="no tokenizer") as caught:
        to_request(request_, None)
    assert caught.value.reason is Reason.NO_TOKENIZER


def test_token_ids_need_no_tokenizer() -> None:
    accepted = accept(proto(), None)
    assert (accepted.request.prompt_ids, accepted.text) == ((1, 2), None)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (sampling(top_p=2), Reason.INVALID_FIELD),
        (proto(text="a " * 16), Reason.PROMPT_TOO_LONG),
        (proto(tokenize=TOKENIZE), Reason.CONFLICTING_FIELDS),
        (proto(text="<|mark|>", tokenize=TOKENIZE), Reason.CONTROL_SYMBOL),
        (structured(grammar="start: ("), Reason.INVALID_GRAMMAR),
    ],
)
def test_reasons(request_: Any, reason: Reason) -> None:
    with pytest.raises(InvalidRequest) as caught:
        to_request(request_)
    assert caught.value.reason is reason


def test_control_symbols_are_refused_by_the_server_or_by_the_request() -> None:
    async def read(refuses: bool, options: pb.TokenizeOptions | None = None) -> tuple[int, ...]:
        return (await PromptReader(CONFIG, TOKENIZER, refuses).read(proto(text="<|mark|>", tokenize=options))).ids

    assert asyncio.run(read(False)) == asyncio.run(read(True, pb.TokenizeOptions(refuse_control_symbols=False))) == (3,)
    for refuses, options in ((True, None), (True, BOS), (False, TOKENIZE)):
        with pytest.raises(InvalidRequest, match=r"control symbol <\|mark\|>"):
            asyncio.run(read(refuses, options))


def test_bos_only_on_request() -> None:
    assert accept(proto(text="a", tokenize=BOS), bos_token_id=7).request.prompt_ids == (7, 1)
    assert accept(proto(text="a"), bos_token_id=7).request.prompt_ids == (1,)


def test_text_long_enough_for_a_thread_is_tokenised_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "INLINE_TEXT_BYTES", 2)
    assert to_request(proto(text="a b a")).prompt_ids == (1, 2, 1)


def test_the_size_of_an_answer_is_bounded() -> None:
    big = {"context_length": 8192, "vocab_size": 131072}
    with pytest.raises(InvalidRequest, match=r"response\.logprobs: would take up to \d+ bytes .* limit is") as caught:
        accept(proto(response=pb.ResponseOptions(logprobs=-1)), **big)
    assert caught.value.field == "response.logprobs"
    ids = pb.TokenIds(ids=[1] * 100)
    with pytest.raises(InvalidRequest, match=r"response\.prompt_logprobs"):
        accept(proto(token_ids=ids, response=pb.ResponseOptions(prompt_logprobs=-1, logprobs=2)), **big)
    accept(proto(response=pb.ResponseOptions(logprobs=-1), stopping=pb.StoppingParams(max_tokens=8)), **big)
    accept(proto(token_ids=pb.TokenIds(ids=[1] * 8000), response=pb.ResponseOptions(prompt_logprobs=20)), **big)


def test_score() -> None:
    def score(**fields: Any) -> Request:
        return asyncio.run(reader().score(pb.ScoreRequest(**fields)))

    request = score(text="a b", top_logprobs=3, request_id="mine")
    assert (request.request_id, request.prompt_ids, request.max_tokens) == ("mine", (1, 2), 0)
    assert request.prompt_logprobs == 3
    assert score(text="a").prompt_logprobs == 0
    for fields, field in (({}, "prompt"), ({"text": "a", "top_logprobs": 513}, "top_logprobs")):
        with pytest.raises(InvalidRequest) as caught:
            score(**fields)
        assert caught.value.field == field
    with pytest.raises(InvalidRequest, match=r"set text or token_ids$"):
        asyncio.run(reader().score(pb.ScoreRequest()))
    with pytest.raises(InvalidRequest, match="does not know"):
        asyncio.run(reader().score(unknown(pb.ScoreRequest(text="a"))))


def test_defaults() -> None:
    request = to_request(proto())
    assert request.max_tokens == 128
    assert request.stop_ids == frozenset(CONFIG.eos_token_ids) == {2}
    assert (request.n, request.min_tokens, request.grammar) == (1, 0, None)
    assert (request.logprobs, request.prompt_logprobs, request.logits) == (None, None, False)
    assert accept(proto()).text == TextSettings()
    assert request.sampling == SamplingSettings(temperature=1.0, top_k=0, top_p=1.0, seed=request.sampling.seed)
    other = to_request(proto())
    assert request.request_id
    assert (request.request_id, request.sampling.seed) != (other.request_id, other.sampling.seed), "drawn"


def test_what_is_set_is_taken() -> None:
    request = to_request(
        pb.GenerateRequest(
            request_id="mine",
            text="b a b",
            sampling=pb.SamplingParams(
                temperature=0,
                top_k=3,
                top_p=0.5,
                min_p=0.25,
                repetition_penalty=1.5,
                frequency_penalty=0.5,
                presence_penalty=-0.5,
                logit_bias={9: -1.5, 3: 100},
                seed=2**64 - 1,
                n=3,
            ),
            stopping=pb.StoppingParams(max_tokens=7, min_tokens=2, stop_token_ids=[5, 6, 5], ignore_eos=True),
            response=pb.ResponseOptions(logprobs=0, prompt_logprobs=-1),
        ),
    )
    assert (request.request_id, request.prompt_ids, request.max_tokens) == ("mine", (2, 1, 2), 7)
    assert request.sampling == SamplingSettings(
        temperature=0.0,
        top_k=3,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias=((3, 100.0), (9, -1.5)),
        seed=2**64 - 1,
    )
    assert (request.n, request.min_tokens, request.logprobs, request.prompt_logprobs) == (3, 2, 0, -1)
    assert request.stop_ids == {5, 6}
    assert to_request(stopping(stop_token_ids=[5]), None).stop_ids == {2, 5}


def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    assert len(to_request(proto(token_ids=pb.TokenIds(ids=[0] * 15)), None).prompt_ids) == 15


def test_text_settings() -> None:
    accepted = accept(
        proto(
            text="a  b",
            stopping=pb.StoppingParams(stop_strings=["x", "yz"], include_stop_string=True, min_tokens=3),
            response=pb.ResponseOptions(echo=True, skip_special_tokens=False),
        )
    )
    assert accepted.text == TextSettings(
        stop_strings=("x", "yz"),
        include_stop_string=True,
        skip_special_tokens=False,
        min_tokens=3,
        prompt_text="a  b",
    )
    from_ids = accept(proto(token_ids=pb.TokenIds(ids=[2, 1]), response=pb.ResponseOptions(echo=True))).text
    assert from_ids is not None
    assert from_ids.prompt_text == TOKENIZER.decode([2, 1])
    no_text = accept(response(text=False)).text
    assert no_text is not None
    assert not no_text.wants_text
