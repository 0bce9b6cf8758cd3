"""One request's trace through real processes, from the SDK to the expert workers; and what they log of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from grokmoe import AsyncClient, Client, ConfigError, InvalidRequest
from router.step_traces import DETAILED_STEPS
from tests import goldens
from tests.cluster.command import Command, running
from tests.otlp_collector import Collector, Span, collecting
from tests.router.tiny import CONFIG

pytestmark = pytest.mark.cluster

NUM_TOKENS = DETAILED_STEPS + 2
SLACK_NS = 2_000_000
"""Every process finds out by itself when its monotonic clock was zero."""

UP = (
    "up", "--model", str(goldens.DIRECTORY), "--dtype", "float32", "--port", "0", "--kv-gib", "0.001", "--experts", "2",
    "--trace-share", "0", "--log-format", "json", "--log-requests",
)  # fmt: skip


class Traced:
    """What is there after a traced request and one that is not, with all processes ended."""

    def __init__(self, command: Command, address: str, collector: Collector) -> None:
        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        prompt = goldens.PROMPTS["len33"]
        with Client(address, tracer_provider=provider) as client, Client(address) as untraced:
            untraced.generate([5, 6, 7], max_tokens=2, request_id="untraced")
            with client.stream(prompt, max_tokens=NUM_TOKENS, ignore_eos=True, request_id="traced") as stream:
                self.trace_id = stream.trace_id
                stream.completion()
            with pytest.raises(InvalidRequest):
                client.generate([], max_tokens=1)
            self.experts = [worker.address for worker in client.status().workers if worker.role.value == "expert"]
        assert command.stop() == 0
        self.client_spans = list(exporter.get_finished_spans())
        self.spans = [span for span in collector.spans if span.trace_id == self.trace_id]
        self.others = [span for span in collector.spans if span.trace_id != self.trace_id]
        self.log = [json.loads(line) for line in command.errors]

    def named(self, name: str) -> list[Span]:
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.begin)

    def parent(self, span: Span) -> Span:
        (found,) = [each for each in self.spans if each.span_id == span.parent_id]
        return found


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    with collecting() as collector, running(*UP, "--traces", collector.url) as command:
        yield Traced(command, command.wait_ready(), collector)


def test_it_begins_in_the_sdk(traced: Traced) -> None:
    names = Counter(span.name for span in traced.client_spans)
    assert names["grokmoe Generate"] == 2  # the stream, and the one that was refused
    first = next(span for span in traced.client_spans if f"{span.context.trace_id:032x}" == traced.trace_id)
    (request,) = traced.named("request")
    assert request.parent_id == f"{first.context.span_id:016x}"
    assert [event.name for event in first.events] == ["attempt"]
    refused = next(span for span in traced.client_spans if span.name == "grokmoe Generate" and span is not first)
    assert refused.attributes is not None
    assert refused.attributes["error.type"] == "InvalidRequest"
    assert not traced.others, "neither refused requests nor those of other callers"


def test_every_span_is_in_the_tree(traced: Traced) -> None:
    ids = {span.span_id for span in traced.spans}
    assert len(ids) == len(traced.spans)
    (request,) = traced.named("request")
    assert {span.name for span in traced.spans if span.parent_id not in ids} == {request.name}
    for span in traced.spans:
        if span is not request:
            parent = traced.parent(span)
            assert parent.begin - SLACK_NS <= span.begin <= span.end <= parent.end + SLACK_NS, (parent, span)
    assert {span.service for span in traced.spans} == {
        "grokmoe-router",
        "grokmoe-attention-worker",
        "grokmoe-expert-worker",
    }


def test_expert_workers_write_their_part_of_each_call(traced: Traced) -> None:
    calls, works = traced.named("expert call"), traced.named("expert worker")
    assert len(works) == len(calls) >= 2 * CONFIG.num_layers
    # Who the router says it has called is one process, and always the same.
    who = {(traced.parent(work).attributes["grokmoe.worker"], work.instance) for work in works}
    assert len(who) == 2
    assert {address for address, _ in who} == set(traced.experts)
    for work in works:
        call = traced.parent(work)
        assert call.name == "expert call"
        assert work.attributes["grokmoe.rows"] == call.attributes["grokmoe.rows"]
        assert work.attributes["grokmoe.layer"] == traced.parent(call).attributes["grokmoe.layer"]
    products = traced.named("grouped GEMM")
    assert len(products) == len(traced.named("waiting")) == len(works)
    assert all(span.attributes["grokmoe.batch_calls"] == 1 for span in products)


def test_the_straggler_is_named(traced: Traced) -> None:
    layers = traced.named("layer")
    named = [layer.attributes["grokmoe.straggler"] for layer in layers if "grokmoe.straggler" in layer.attributes]
    assert named
    assert set(named) <= set(traced.experts)


def test_the_attention_worker_writes_its_part_of_sampled_steps(traced: Traced) -> None:
    steps = traced.named("step")
    assert len(steps) == NUM_TOKENS
    parts = traced.named("attention step")
    assert [traced.parent(part).span_id for part in parts] == [steps[0].span_id, steps[DETAILED_STEPS].span_id]
    assert [part.attributes["grokmoe.tokens"] for part in parts] == [33, 1]
    assert all(part.attributes["grokmoe.stage.qkv"] > 0 for part in parts)
    turns = traced.named("attention")
    assert [turn.attributes["grokmoe.layer"] for turn in turns] == [*range(CONFIG.num_layers + 1)] * 2


def test_the_log_names_request_and_trace(traced: Traced) -> None:
    assert {line["service"] for line in traced.log} == {"router", "attention_worker", "expert_worker"}
    ended = {line["request_id"]: line for line in traced.log if line["message"].startswith("request ended")}
    assert set(ended) == {"traced", "untraced"}
    line = ended["traced"]
    assert line["trace_id"] == traced.trace_id
    assert "trace_id" not in ended["untraced"]
    assert (line["level"], line["outcome"], line["prompt_tokens"]) == ("info", "length", 33)
    assert line["output_tokens"] == NUM_TOKENS
    assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]


def test_the_command_begins_one_too() -> None:
    with collecting() as collector, running(*UP, "--traces", collector.url) as command:
        address = command.wait_ready()
        generate = [sys.executable, "-m", "launcher", "generate", "--address", address, "--traces", collector.url]
        # The tiny model has no tokenizer: also a call that is refused is a trace.
        told = subprocess.run([*generate, "x"], capture_output=True, text=True, timeout=120, check=False)
        assert told.returncode == 1
        (span,) = collector.named("grokmoe Generate")
        assert span.service == "grokmoe-generate"
        assert span.attributes["error.type"] == "FailedPrecondition"


def test_without_opentelemetry_a_client_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace.propagation.tracecontext", None)
    with pytest.raises(ConfigError, match="extra otel"):
        AsyncClient("127.0.0.1:1", tracer_provider=TracerProvider())
