"""From a request of vLLM's service to one of ours: every field honoured or refused, none ignored.

A scalar that is not `optional` cannot be told apart from one at zero. Zero means unset where vLLM takes it so, which is
everywhere but in `skip_special_tokens`: senders always set it.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.unknown_fields import UnknownFieldSet

from grokmoe.errors import InvalidRequest
from grokmoe.v1 import generation_pb2 as pb

RANDOM_SEED = -1
"""As a seed: draw one."""

LONGEST_PROMPT = -1
"""As a number of tokens to truncate to: as many as the context allows."""

_FIELDS = frozenset({"request_id", "tokenized", "text", "sampling_params", "stream", "data_parallel_rank"})

_SAMPLING_FIELDS = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "max_tokens",
        "min_tokens",
        "stop",
        "stop_token_ids",
        "skip_special_tokens",
        "spaces_between_special_tokens",  # of text, and only ids are returned
        "ignore_eos",
        "n",
        "logprobs",
        "prompt_logprobs",
        "seed",
        "include_stop_str_in_output",
        "logit_bias",
        "truncate_prompt_tokens",
        "grammar_from_first_token",  # here a constraint always begins there
        "json_schema",
        "regex",
        "grammar",
        "json_object",
        "choice",
    }
)

_THEIR_NAMES = {
    "stop_strings": "stop",
    "include_stop_string": "include_stop_str_in_output",
}


def to_generate_request(request: Any, context_length: int) -> pb.GenerateRequest:
    """request: a vllm.grpc.engine.GenerateRequest. context_length: most tokens of prompt and output together.

    Values are not checked here but where all requests are; `their_error` gives the fields their names back. Raises
    InvalidRequest for what cannot be honoured.
    """
    _refuse_others(request, _FIELDS, "")
    params = request.sampling_params
    _refuse_others(params, _SAMPLING_FIELDS, "sampling_params.")
    if request.data_parallel_rank != 0:
        raise InvalidRequest("data_parallel_rank", f"is {request.data_parallel_rank}, there is rank 0 only")
    ours = pb.GenerateRequest(request_id=request.request_id)
    num_prompt = _prompt(request, context_length, ours)
    _sampling(params, ours.sampling)
    _stopping(params, context_length - num_prompt, ours.stopping)
    _structured(params, ours)
    ours.response.text = False
    ours.response.skip_special_tokens = params.skip_special_tokens
    if params.HasField("logprobs"):
        ours.response.logprobs = params.logprobs
    if params.HasField("prompt_logprobs"):
        ours.response.prompt_logprobs = params.prompt_logprobs
    return ours


def their_error(error: InvalidRequest) -> InvalidRequest:
    """The same error with the field named as the caller knows it, such as `sampling_params.top_p`."""
    group, _, path = error.field.partition(".")
    match group:
        case "sampling" | "stopping" | "response" | "structured":
            name, bracket, index = path.partition("[")
            field = f"sampling_params.{_THEIR_NAMES.get(name, name)}{bracket}{index}".rstrip(".")
        case "token_ids":
            field = "tokenized.input_ids"
        case "prompt":
            field = "input"
        case _:
            field = error.field
    return InvalidRequest(field, error.description, reason=error.reason)


def _refuse_others(message: Any, honoured: frozenset[str], path: str) -> None:
    for field, _ in message.ListFields():
        if field.name not in honoured:
            raise InvalidRequest(path + field.name, "is not supported")
    unknown: Any = UnknownFieldSet(message)
    if len(unknown):
        raise InvalidRequest(f"{path}{unknown[0].field_number}", "is a field that this server does not know")


def _prompt(request: Any, context_length: int, ours: pb.GenerateRequest) -> int:
    """Returns how many tokens the prompt has at least."""
    params = request.sampling_params
    is_truncated = params.HasField("truncate_prompt_tokens")
    match request.WhichOneof("input"):
        case "tokenized":
            ids = request.tokenized.input_ids
            ours.token_ids.ids.extend(
                _last(ids, params.truncate_prompt_tokens, context_length) if is_truncated else ids
            )
            return len(ours.token_ids.ids)
        case "text":
            if is_truncated:
                raise InvalidRequest("sampling_params.truncate_prompt_tokens", "needs a prompt of token ids")
            ours.text = request.text
    return 1


def _last(ids: Any, num_tokens: int, context_length: int) -> Any:
    """The end of a prompt, as vLLM truncates."""
    longest = context_length - 1
    if num_tokens == LONGEST_PROMPT:
        num_tokens = longest
    if not 1 <= num_tokens <= longest:
        raise InvalidRequest(
            "sampling_params.truncate_prompt_tokens",
            f"is {num_tokens}, must be between 1 and {longest}, or {LONGEST_PROMPT}",
        )
    return ids[-num_tokens:]


def _sampling(params: Any, ours: pb.SamplingParams) -> None:
    if params.HasField("temperature"):
        ours.temperature = params.temperature
    ours.top_k, ours.min_p = params.top_k, params.min_p
    ours.frequency_penalty, ours.presence_penalty = params.frequency_penalty, params.presence_penalty
    if params.top_p:
        ours.top_p = params.top_p
    if params.repetition_penalty:
        ours.repetition_penalty = params.repetition_penalty
    if params.n:
        ours.n = params.n
    if params.HasField("seed") and params.seed != RANDOM_SEED:
        ours.seed = params.seed % (1 << 64)
    for token_id, bias in params.logit_bias.items():
        if token_id < 0:
            raise InvalidRequest("sampling_params.logit_bias", f"holds {token_id}, which is no token id")
        ours.logit_bias[token_id] = bias


def _stopping(params: Any, room: int, ours: pb.StoppingParams) -> None:
    # Unset means: until the context is full. A prompt that leaves no room is refused where all prompts are.
    ours.max_tokens = params.max_tokens if params.HasField("max_tokens") else max(1, room)
    ours.min_tokens = params.min_tokens
    ours.ignore_eos = params.ignore_eos
    ours.stop_token_ids.extend(params.stop_token_ids)
    ours.stop_strings.extend(params.stop)
    if params.stop:
        ours.include_stop_string = params.include_stop_str_in_output


def _structured(params: Any, ours: pb.GenerateRequest) -> None:
    match params.WhichOneof("constraint"):
        case None:
            return
        case "choice":
            ours.structured.choice.choices.extend(params.choice.choices)
            ours.structured.choice.SetInParent()
        case name:
            setattr(ours.structured, name, getattr(params, name))
