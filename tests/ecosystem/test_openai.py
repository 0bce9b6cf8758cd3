"""The unmodified `openai` SDK against `grokmoe serve --openai`: gateway and server as processes, on loopback.

Texts are compared with what grokmoe's own client gets for the same prompt, past the gateway.
"""

from __future__ import annotations

import dataclasses
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("smg")
pytest.importorskip("smg_grpc_proto")
pytest.importorskip("openai")

import openai

from grokmoe import Client
from tests.cluster.command import Command, running
from tests.ecosystem.gateway import wait_openai

pytestmark = pytest.mark.cluster

MODEL = "demo_model"
PROMPT = "KING HENRY.\nOnce more unto the breach, dear friends,"
FREE_TIMEOUT = 10.0


@dataclasses.dataclass
class Served:
    """What the command has said of itself, and a client of either kind. `url`: base URL of the HTTP API."""

    command: Command
    url: str
    http: Any
    own: Client
    texts: dict[Any, list[str]] = dataclasses.field(default_factory=dict)

    def wait_idle(self) -> None:
        """Returns when no sequence runs and no page is in use; fails if that takes long."""
        deadline = time.monotonic() + FREE_TIMEOUT
        while True:
            status = self.own.status()
            used = sum(worker.used_pages for worker in status.workers)
            if not (status.running or status.waiting or used):
                return
            assert time.monotonic() < deadline, f"{status.running} running, {used} pages in use"
            time.sleep(0.01)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with running("serve", "--port", "0", "--kv-gib", "0.02", "--openai", "--openai-port", "0") as command:
        address = command.wait_ready()
        url = wait_openai(command)
        http = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        with http, Client(address) as own:
            yield Served(command, url, http, own)
        assert command.stop() == 0
        assert not any("Traceback" in line for line in command.errors), "\n".join(command.errors)


def own_texts(served: Served, prompt: str = PROMPT, **options: Any) -> list[str]:
    """What our own client gets, each text computed once."""
    options = {"max_tokens": 16, "temperature": 0, **options}
    key = (prompt, repr(sorted(options.items())))
    if key not in served.texts:
        served.texts[key] = [candidate.text for candidate in served.own.generate(prompt, **options).candidates]
    return served.texts[key]


def own_text(served: Served, prompt: str = PROMPT, **options: Any) -> str:
    return own_texts(served, prompt, **options)[0]


def completion(served: Served, **options: Any) -> Any:
    return served.http.completions.create(
        **{"model": MODEL, "prompt": PROMPT, "max_tokens": 16, "temperature": 0, **options}
    )


def chat(served: Served, content: str = PROMPT, **options: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    return served.http.chat.completions.create(
        **{"model": MODEL, "messages": messages, "max_tokens": 16, "temperature": 0, **options}
    )


def test_models(served: Served) -> None:
    assert [model.id for model in served.http.models.list()] == [MODEL]
    assert served.http.models.retrieve(MODEL).id == MODEL


def test_completion(served: Served) -> None:
    done = completion(served)
    assert done.choices[0].text == own_text(served)
    assert done.choices[0].finish_reason == "length"
    prompt_tokens = served.own.generate(PROMPT, max_tokens=1).usage.prompt_tokens
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (prompt_tokens, 16)


def test_completion_streamed(served: Served) -> None:
    chunks = list(completion(served, stream=True, stream_options={"include_usage": True}))
    texts = [choice.text for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == own_text(served)
    assert len(texts) > 5
    assert chunks[-1].usage.completion_tokens == 16
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"


def test_completion_of_several_prompts(served: Served) -> None:
    prompts = [PROMPT, "JULIET.\nO Romeo,"]
    done = completion(served, prompt=prompts)
    assert [choice.text for choice in done.choices] == [own_text(served, prompt) for prompt in prompts]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(served: Served, stream: bool) -> None:
    text = own_text(served)
    stop = text[9:12]
    done = completion(served, stop=[stop], stream=stream)
    if stream:
        choices = [choice for chunk in done for choice in chunk.choices]
        told, reason = "".join(choice.text for choice in choices), choices[-1].finish_reason
    else:
        told, reason = done.choices[0].text, done.choices[0].finish_reason
        assert done.usage.completion_tokens < 16, "the server drew on behind the stop string"
    assert told == text[: text.index(stop)]
    assert reason == "stop"


def test_a_seed_repeats_and_another_does_not(served: Served) -> None:
    one, again, other = (completion(served, temperature=1, seed=seed).choices[0].text for seed in (5, 5, 6))
    assert one == again != other
    assert one == own_text(served, temperature=1, seed=5)


def test_two_candidates(served: Served) -> None:
    done = completion(served, temperature=1, seed=5, n=2)
    assert [choice.text for choice in done.choices] == own_texts(served, temperature=1, seed=5, n=2)
    assert done.choices[0].text != done.choices[1].text
    assert done.usage.completion_tokens == 32


def test_two_candidates_streamed(served: Served) -> None:
    texts = ["", ""]
    for chunk in completion(served, temperature=1, seed=5, n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == own_texts(served, temperature=1, seed=5, n=2)


def test_echo(served: Served) -> None:
    assert completion(served, echo=True).choices[0].text == PROMPT + own_text(served)


def test_penalties_change_the_text_as_they_do_for_our_client(served: Served) -> None:
    penalties = {"frequency_penalty": 1.5, "presence_penalty": 1.0}
    text = completion(served, **penalties).choices[0].text
    assert text == own_text(served, **penalties)
    assert text != own_text(served)


def test_parameters_beyond_openai(served: Served) -> None:
    """vLLM's, by the SDK's extra_body."""
    extra = {"top_k": 5, "min_p": 0.02, "repetition_penalty": 1.3, "min_tokens": 3, "ignore_eos": True}
    text = completion(served, temperature=1, seed=9, extra_body=extra).choices[0].text
    assert text == own_text(served, temperature=1, seed=9, **extra)
    assert text != own_text(served, temperature=1, seed=9)


def test_completion_in_a_form(served: Served) -> None:
    text = completion(served, extra_body={"regex": "[a-c]{3}-[0-9]{2}"}).choices[0].text
    assert len(text) == 6
    assert text[3] == "-"


def test_chat(served: Served) -> None:
    done = chat(served)
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].message.content == own_text(served)
    assert done.choices[0].finish_reason == "length"
    assert done.usage.completion_tokens == 16


def test_messages_are_joined_line_by_line(served: Served) -> None:
    messages = [
        {"role": "system", "content": "ACT III."},
        {"role": "user", "content": "HAMLET.\nTo be"},
    ]
    done = served.http.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=0)
    assert done.choices[0].message.content == own_text(served, "ACT III.\nHAMLET.\nTo be", max_tokens=12)


def test_chat_streamed_with_usage(served: Served) -> None:
    chunks = list(chat(served, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == own_text(served)
    (usage,) = [chunk.usage for chunk in chunks if chunk.usage]
    assert usage.completion_tokens == 16
    assert usage.total_tokens == usage.prompt_tokens + 16


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(served: Served, stream: bool) -> None:
    done = chat(served, logprobs=True, top_logprobs=3, stream=stream, max_tokens=6)
    if stream:
        rows = [row for chunk in done for choice in chunk.choices if choice.logprobs for row in choice.logprobs.content]
    else:
        rows = done.choices[0].logprobs.content
    own = served.own.generate(PROMPT, max_tokens=6, temperature=0, logprobs=3)
    (candidate,) = own.candidates
    assert [row.logprob for row in rows] == pytest.approx([row.logprob for row in candidate.logprobs], abs=1e-5)
    for row in rows:
        assert len(row.top_logprobs) == 3
        assert row.top_logprobs[0].logprob == pytest.approx(row.logprob, abs=1e-5)  # greedy: the first is the drawn one


def test_chat_by_a_json_schema(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"ghost": {"type": "boolean"}},
        "required": ["ghost"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "scene", "strict": True, "schema": schema}}
    done = chat(served, response_format=form, max_tokens=150)
    assert done.choices[0].finish_reason == "stop"
    value = json.loads(done.choices[0].message.content)
    assert set(value) == {"ghost"}
    assert isinstance(value["ghost"], bool)


def test_chat_json_object(served: Served) -> None:
    """This model never wrote JSON: what can be asked of it is that it has begun an object."""
    done = chat(served, response_format={"type": "json_object"})
    assert done.choices[0].message.content.lstrip().startswith("{")


def test_responses(served: Served) -> None:
    done = served.http.responses.create(model=MODEL, input=PROMPT, max_output_tokens=16, temperature=0)
    assert done.output_text == own_text(served, max_tokens=16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 3}, "temperature"),  # the gateway's own check
        ({"extra_body": {"repetition_penalty": 1.5, "stop_token_ids": [2048]}}, "sampling_params.stop_token_ids"),
        ({"extra_body": {"regex": "("}}, "sampling_params.regex"),
        ({"prompt": "word " * 1100}, "tokens"),
    ],
)
def test_bad_parameters_are_the_callers_fault(served: Served, options: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        completion(served, **options)
    assert caught.value.status_code == 400
    assert words in caught.value.message


def test_another_model_is_not_found(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="nope"):
        completion(served, model="nope")


def test_embeddings_are_not_there(served: Served) -> None:
    with pytest.raises(openai.APIStatusError, match="Embed is not supported") as caught:
        served.http.embeddings.create(model=MODEL, input="a")
    assert caught.value.status_code == 501


def test_a_client_that_leaves_a_stream_frees_its_request(served: Served) -> None:
    stream = completion(served, stream=True, max_tokens=900, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert served.own.status().running == 1
    steps = served.own.status().steps
    stream.close()
    served.wait_idle()
    assert served.own.status().steps - steps < 600, "it was drawn to its end"


def test_a_client_that_does_not_wait_for_its_answer_frees_its_request(served: Served) -> None:
    steps = served.own.status().steps
    with pytest.raises(openai.APITimeoutError):
        completion(served, max_tokens=900, extra_body={"ignore_eos": True}, timeout=0.3)
    served.wait_idle()
    assert served.own.status().steps - steps < 600, "it was drawn to its end"


def test_the_gateway_cannot_be_given_other_servers(served: Served) -> None:
    """Its control plane asks for a key that nobody knows."""
    for path, body in (("/workers", b'{"url": "grpc://127.0.0.1:1"}'), ("/flush_cache", b"")):
        url = served.url.removesuffix("/v1") + path
        request = urllib.request.Request(url, data=body, headers={"content-type": "application/json"}, method="POST")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert caught.value.code == 401
        caught.value.close()
