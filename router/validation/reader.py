"""Whole requests: the fields of GenerateRequest and ScoreRequest, alone and together."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from typing import Any

from google.protobuf.unknown_fields import UnknownFieldSet

from grokmoe.errors import InvalidRequest, Reason
from grokmoe.model_config import ModelConfig
from grokmoe.step_plan import WHOLE_VOCABULARY
from grokmoe.v1 import generation_pb2 as pb
from router.request import Grammar, Request
from router.structured import Format, GrammarCompiler
from router.text import TextSettings
from router.validation.embeds import FIELD as EMBEDS
from router.validation.embeds import check_beside_embeds
from router.validation.prompt import Prompt, PromptReader
from router.validation.sampling import read_num_candidates, read_sampling

DEFAULT_MAX_TOKENS = 128
MAX_STOP_TOKEN_IDS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 256
MAX_REQUEST_ID_LENGTH = 128
MAX_LOGPROB_BYTES = 48 * 1024 * 1024
"""Of an answer's log-probabilities: 8 bytes per entry. One message is at most 64 MiB (grokmoe.channel)."""

_MESSAGES = ("sampling", "stopping", "response", "tokenize", "structured", "resumed")


@dataclasses.dataclass(frozen=True)
class Accepted:
    """A request as the engine takes it, and what is to be done with its tokens. text: None without a tokenizer."""

    request: Request
    text: TextSettings | None


class RequestReader:
    """The rules of one model. compiler: None when it has no tokenizer."""

    def __init__(self, config: ModelConfig, prompts: PromptReader, compiler: GrammarCompiler | None) -> None:
        self._config, self._prompts, self._compiler = config, prompts, compiler

    async def generate(self, proto: pb.GenerateRequest) -> Accepted:
        """Raises InvalidRequest naming field, value and limit; FailedPrecondition for what needs a tokenizer."""
        _refuse_unknown(proto, *_MESSAGES)
        stopping, response = proto.stopping, proto.response
        request_id = _request_id(proto.request_id)
        sampling, n = read_sampling(proto.sampling, self._config), read_num_candidates(proto.sampling)
        max_tokens, min_tokens = self._token_limits(proto)
        stop_ids = self._stop_ids(stopping)
        stop_strings = self._stop_strings(stopping)
        logprobs = self._num_logprobs("response.logprobs", response, "logprobs")
        prompt_logprobs = self._num_logprobs("response.prompt_logprobs", response, "prompt_logprobs")
        wants_text = response.text if response.HasField("text") else True
        if response.echo and not wants_text:
            raise _conflict("response.echo", "response.text", "false")
        if response.echo:
            self._prompts.need_tokenizer("response.echo")
        if proto.WhichOneof("prompt") == EMBEDS:
            check_beside_embeds(proto)
        prompt = await self._prompts.read(proto)
        self._check_logprob_size(len(prompt.ids), prompt_logprobs, n * max_tokens, logprobs)
        resumed_ids = self._resumed(proto, len(prompt.ids), max_tokens)
        grammar = await self._grammar(proto)
        request = Request(
            request_id=request_id,
            prompt_ids=prompt.ids,
            sampling=sampling,
            n=n,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop_ids=stop_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar,
            resumed_ids=resumed_ids,
            embeds=prompt.embeds,
        )
        if self._compiler is None:
            return Accepted(request, None)
        skip_special = response.skip_special_tokens if response.HasField("skip_special_tokens") else True
        text = TextSettings(
            stop_strings=stop_strings,
            include_stop_string=stopping.include_stop_string,
            skip_special_tokens=skip_special,
            min_tokens=min_tokens,
            wants_text=wants_text,
            prompt_text=self._echo(prompt, skip_special) if response.echo else "",
        )
        return Accepted(request, text)

    async def score(self, proto: pb.ScoreRequest) -> Request:
        """A request that computes the prompt and draws nothing. Raises as `generate`."""
        _refuse_unknown(proto, "tokenize")
        request_id = _request_id(proto.request_id)
        num_top = self._num_logprobs("top_logprobs", proto, "top_logprobs") or 0
        prompt = await self._prompts.read(proto)
        self._check_logprob_size(len(prompt.ids), num_top, 0, None, "top_logprobs")
        return Request(request_id=request_id, prompt_ids=prompt.ids, max_tokens=0, prompt_logprobs=num_top)

    def _token_limits(self, proto: pb.GenerateRequest) -> tuple[int, int]:
        stopping = proto.stopping
        max_tokens = stopping.max_tokens if stopping.HasField("max_tokens") else DEFAULT_MAX_TOKENS
        if max_tokens < 1:
            raise InvalidRequest("stopping.max_tokens", "is 0, must be at least 1; Score generates nothing")
        if stopping.min_tokens > max_tokens:
            raise InvalidRequest(
                "stopping.min_tokens", f"is {stopping.min_tokens}, must be at most max_tokens, {max_tokens}"
            )
        if proto.structured.WhichOneof("format"):
            if stopping.min_tokens:
                raise _conflict("stopping.min_tokens", "structured")
            if stopping.ignore_eos:
                raise _conflict("stopping.ignore_eos", "structured")
        return max_tokens, stopping.min_tokens

    def _resumed(self, proto: pb.GenerateRequest, num_prompt: int, max_tokens: int) -> tuple[int, ...]:
        if not proto.HasField("resumed"):
            return ()
        ids = tuple(proto.resumed.ids)
        self._prompts.check_ids("resumed.ids", ids)
        limit = min(max_tokens, self._config.context_length - num_prompt) - 1
        if len(ids) > limit:
            raise InvalidRequest("resumed.ids", f"holds {len(ids)} tokens, max_tokens and the context allow {limit}")
        sampling, response = proto.sampling, proto.response
        if not sampling.HasField("seed") and not (sampling.HasField("temperature") and sampling.temperature == 0):
            message = "needs sampling.seed, or a temperature of 0"
            raise InvalidRequest("resumed", message, reason=Reason.CONFLICTING_FIELDS)
        if sampling.n > 1:
            raise _conflict("resumed", "sampling.n", "above 1")
        for name in ("echo", "prompt_logprobs"):
            if response.HasField(name) and getattr(response, name) is not False:
                raise _conflict("resumed", f"response.{name}")
        return ids

    def _stop_ids(self, stopping: pb.StoppingParams) -> frozenset[int]:
        field, ids = "stopping.stop_token_ids", stopping.stop_token_ids
        if len(ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(field, f"holds {len(ids)} ids, limit is {MAX_STOP_TOKEN_IDS}")
        self._prompts.check_ids(field, ids)
        return frozenset((*ids, *(() if stopping.ignore_eos else self._config.eos_token_ids)))

    def _stop_strings(self, stopping: pb.StoppingParams) -> tuple[str, ...]:
        field, strings = "stopping.stop_strings", tuple(stopping.stop_strings)
        if stopping.include_stop_string and not strings:
            raise InvalidRequest("stopping.include_stop_string", "is true, but there are no stop_strings")
        if len(strings) > MAX_STOP_STRINGS:
            raise InvalidRequest(field, f"holds {len(strings)} strings, limit is {MAX_STOP_STRINGS}")
        for index, string in enumerate(strings):
            if not 1 <= len(string) <= MAX_STOP_STRING_LENGTH:
                raise InvalidRequest(
                    f"{field}[{index}]", f"has {len(string)} characters, must have 1 to {MAX_STOP_STRING_LENGTH}"
                )
        if strings:
            self._prompts.need_tokenizer(field)
        return strings

    def _num_logprobs(self, field: str, proto: Any, name: str) -> int | None:
        if not proto.HasField(name):
            return None
        number = int(getattr(proto, name))
        if not WHOLE_VOCABULARY <= number <= self._config.vocab_size:
            raise InvalidRequest(
                field, f"is {number}, must be in [-1, {self._config.vocab_size}]; -1 is the whole vocabulary"
            )
        return number

    def _check_logprob_size(
        self,
        num_prompt: int,
        prompt_top: int | None,
        num_output: int,
        output_top: int | None,
        prompt_field: str = "response.prompt_logprobs",
    ) -> None:
        sizes = {}
        for field, rows, num_top in (
            (prompt_field, num_prompt, prompt_top),
            ("response.logprobs", num_output, output_top),
        ):
            if num_top is not None:
                sizes[field] = 8 * rows * (1 + (self._config.vocab_size if num_top < 0 else num_top))
        if sum(sizes.values()) > MAX_LOGPROB_BYTES:
            field = max(sizes, key=sizes.__getitem__)
            raise InvalidRequest(
                field, f"would take up to {sum(sizes.values())} bytes for all tokens, limit is {MAX_LOGPROB_BYTES}"
            )

    async def _grammar(self, proto: pb.GenerateRequest) -> Grammar | None:
        kind = proto.structured.WhichOneof("format")
        if kind is None:
            if proto.HasField("structured"):
                raise InvalidRequest("structured", "is empty: set one format")
            return None
        field = f"structured.{kind}"
        self._prompts.need_tokenizer(field)
        assert self._compiler is not None
        value = getattr(proto.structured, kind)
        if kind == "json_object" and not value:
            raise InvalidRequest(field, "is false; leave structured unset")
        text = tuple(value.choices) if kind == "choice" else value if isinstance(value, str) else ""
        return await asyncio.to_thread(self._compiler.compile, Format(kind), text)

    def _echo(self, prompt: Prompt, skip_special: bool) -> str:
        if prompt.text is not None:
            return prompt.text
        return self._prompts.need_tokenizer("response.echo").decode(prompt.ids, skip_special=skip_special)


def _request_id(given: str) -> str:
    if len(given) > MAX_REQUEST_ID_LENGTH:
        raise InvalidRequest("request_id", f"has {len(given)} characters, limit is {MAX_REQUEST_ID_LENGTH}")
    return given or str(uuid.uuid4())


def _conflict(field: str, other: str, value: str = "set") -> InvalidRequest:
    return InvalidRequest(field, f"cannot be used while {other} is {value}", reason=Reason.CONFLICTING_FIELDS)


def _refuse_unknown(proto: Any, *messages: str) -> None:
    """A field that a newer client sends and this server does not know must not be ignored."""
    parts = [("", proto), *((f"{name}.", getattr(proto, name)) for name in messages if proto.HasField(name))]
    for path, part in parts:
        unknown: Any = UnknownFieldSet(part)
        if len(unknown):
            raise InvalidRequest(f"{path}{unknown[0].field_number}", "is a field that this server does not know")
