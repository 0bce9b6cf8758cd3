"""What a caller may ask of a generation, and the messages that carry it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict, TypeVar, Unpack

from grokmoe.embeds import Embeds
from grokmoe.errors import InvalidRequest, Reason
from grokmoe.v1 import generation_pb2 as pb

Prompt = str | Sequence[int] | Embeds
"""Text, which the server tokenises, or token ids, or rows in their place; not for a score."""

R = TypeVar("R", pb.GenerateRequest, pb.ScoreRequest)


class TokenizeOptions(TypedDict, total=False):
    """How text becomes token ids. Unset or None: the server's default."""

    add_bos: bool | None
    """Begin with the model's begin-of-sequence id; default False."""
    refuse_control_symbols: bool | None
    """Refuse text that spells a control symbol of the vocabulary; default False, or as the server was started."""


class ScoreOptions(TokenizeOptions, total=False):
    """Optional arguments of a score. Unset or None: the server's default."""

    top_logprobs: int | None
    """How many of the most likely tokens to return at each position; default 0, -1: the whole vocabulary."""
    request_id: str | None
    """The caller's name for the request; drawn by the server if unset."""


class GenerateOptions(TokenizeOptions, total=False):
    """Optional arguments of a generation. Unset or None: the server's default, named in generation.proto."""

    max_tokens: int | None
    """Most tokens to generate; default 128."""
    min_tokens: int | None
    """Nothing but `max_tokens` and the context ends generation before this many; default 0."""
    n: int | None
    """Candidates, each drawn on its own; default 1."""
    temperature: float | None
    """0 is greedy; default 1."""
    top_k: int | None
    """Keep the k most likely tokens; default 0: all."""
    top_p: float | None
    """Keep the smallest set of tokens with this probability, in (0, 1]; default 1: all."""
    min_p: float | None
    """Keep tokens at least this likely relative to the most likely one, in [0, 1]; default 0: all."""
    seed: int | None
    """The same seed and request draw the same tokens; drawn per request if unset."""
    repetition_penalty: float | None
    """Above 1: tokens of prompt and output become less likely; default 1."""
    frequency_penalty: float | None
    """Taken from a token's logit for each time it is in the output; default 0."""
    presence_penalty: float | None
    """Taken from the logit of each token that is in the output; default 0."""
    logit_bias: Mapping[int, float] | None
    """Token id to what is added to its logit."""
    stop: str | Sequence[str] | None
    """One text or several that end generation where they appear."""
    include_stop_string: bool | None
    """Leave the stop text in the answer's; default False."""
    stop_token_ids: Sequence[int] | None
    """Ids that end generation, beside the model's own."""
    ignore_eos: bool | None
    """Do not end at the model's end-of-sequence id; default False."""
    json_schema: Mapping[str, Any] | str | None
    """The output is JSON of this schema. Of this and the next four at most one can be given."""
    json_object: bool | None
    """True: the output is a JSON object, of any kind."""
    regex: str | None
    """The output as a whole matches this regular expression."""
    grammar: str | None
    """The output follows this context-free grammar, in Lark syntax or GBNF."""
    choice: Sequence[str] | None
    """The output is one of these texts."""
    logprobs: int | None
    """Log-probabilities of each token drawn and of the N most likely ones; 0: of the token only, -1: of all."""
    prompt_logprobs: int | None
    """The same for the prompt's tokens."""
    echo: bool | None
    """Begin the text with the prompt's; default False."""
    skip_special_tokens: bool | None
    """Leave special tokens out of the text; default True."""
    text: bool | None
    """Return text if the model has a tokenizer; default True."""
    resumed: Sequence[int] | None
    """Ids that a stream had brought before it broke: generation goes on after them, and only what comes after is sent.

    Needs `seed`, or temperature 0; not with `n` above 1, `echo` or `prompt_logprobs`."""
    request_id: str | None
    """The caller's name for the request; drawn by the server if unset."""


_MESSAGE_OF = {
    **dict.fromkeys(("add_bos", "refuse_control_symbols"), "tokenize"),
    **dict.fromkeys(("n", "temperature", "top_k", "top_p", "min_p", "seed", "logit_bias"), "sampling"),
    **dict.fromkeys(("repetition_penalty", "frequency_penalty", "presence_penalty"), "sampling"),
    **dict.fromkeys(("max_tokens", "min_tokens", "stop_token_ids", "ignore_eos"), "stopping"),
    **dict.fromkeys(("stop_strings", "include_stop_string"), "stopping"),
    **dict.fromkeys(("logprobs", "prompt_logprobs", "echo", "skip_special_tokens", "text"), "response"),
}
"""Option to the sub-message of the request that has it; an option that is not here is a field of the request."""

_STRUCTURED = ("json_schema", "json_object", "regex", "grammar", "choice")


def build_request(prompt: Prompt, **options: Unpack[GenerateOptions]) -> pb.GenerateRequest:
    """Sets what is given and leaves the rest unset. TypeError, InvalidRequest: what no message can carry."""
    given = _given(GenerateOptions, options)
    if "stop" in given:
        stop = given.pop("stop")
        given["stop_strings"] = [stop] if isinstance(stop, str) else stop
    structured = {name: given.pop(name) for name in _STRUCTURED if name in given}
    if not structured.get("json_object", True):
        del structured["json_object"]
    resumed = given.pop("resumed", ())
    request = _build(pb.GenerateRequest(), prompt, given)
    if len(resumed):
        _set(request, "resumed.ids", resumed)
    if len(structured) > 1:
        names = " and ".join(structured)
        raise InvalidRequest("structured", f"{names} cannot be combined", reason=Reason.CONFLICTING_FIELDS)
    for name, value in structured.items():
        _set_structured(request.structured, name, value)
    return request


def build_score_request(prompt: Prompt, **options: Unpack[ScoreOptions]) -> pb.ScoreRequest:
    """As `build_request`."""
    return _build(pb.ScoreRequest(), prompt, _given(ScoreOptions, options))


def build_tokenize_request(text: str, **options: Unpack[TokenizeOptions]) -> pb.TokenizeRequest:
    """As `build_request`."""
    request = pb.TokenizeRequest()
    _set(request, "text", text)
    for name, value in _given(TokenizeOptions, options).items():
        _set(request, f"options.{name}", value)
    return request


def build_detokenize_request(token_ids: Sequence[int], skip_special_tokens: bool | None) -> pb.DetokenizeRequest:
    """As `build_request`."""
    request = pb.DetokenizeRequest()
    _set(request, "token_ids", token_ids)
    if skip_special_tokens is not None:
        request.skip_special_tokens = skip_special_tokens
    return request


def _given(kind: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    unknown = options.keys() - kind.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}")
    return {name: value for name, value in options.items() if value is not None}


def _build(request: R, prompt: Prompt, given: Mapping[str, Any]) -> R:
    if isinstance(prompt, bytes | bytearray):
        raise TypeError("a prompt is text or token ids, not bytes")
    if isinstance(prompt, str):
        _set(request, "text", prompt)
    elif isinstance(prompt, Embeds):
        if not isinstance(request, pb.GenerateRequest):
            raise TypeError("a score is of token ids, which a prompt of Embeds has none of")
        request.inputs_embeds.CopyFrom(prompt.to_message())
    else:
        with _invalid("token_ids"):
            request.token_ids.CopyFrom(pb.TokenIds(ids=prompt))
    for name, value in given.items():
        _set(request, f"{_MESSAGE_OF[name]}.{name}" if name in _MESSAGE_OF else name, value)
    return request


def _set(message: Any, path: str, value: Any) -> None:
    """Sets the field at a dotted path; an empty list or mapping leaves it and what it is in unset."""
    parent, _, name = path.rpartition(".")
    if parent:
        message = getattr(message, parent)
    field = message.DESCRIPTOR.fields_by_name[name]
    with _invalid(path):
        if not field.is_repeated:
            setattr(message, name, value)
        elif isinstance(value, Mapping):
            # Even an empty update() would make the sub-message present.
            if value:
                getattr(message, name).update(value)
        elif len(value):
            getattr(message, name).extend(value)


def _set_structured(structured: pb.StructuredOutput, name: str, value: Any) -> None:
    with _invalid(f"structured.{name}"):
        if name == "choice":
            if isinstance(value, str):
                raise TypeError("choice is a sequence of texts, not a text")
            structured.choice.CopyFrom(pb.Choices(choices=value))
        elif name == "json_schema" and isinstance(value, Mapping):
            structured.json_schema = json.dumps(value, allow_nan=False)
        else:
            setattr(structured, name, value)


@contextlib.contextmanager
def _invalid(field: str) -> Iterator[None]:
    """A value outside its field's wire type never reaches the server that would judge it."""
    try:
        yield
    except ValueError as error:
        raise InvalidRequest(field, str(error)) from error
