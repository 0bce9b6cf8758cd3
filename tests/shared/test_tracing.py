"""Traces: one request from its caller's span to single expert calls, and nothing where nobody asks for them."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokmoe import AsyncClient
from grokmoe.errors import ConfigError, Unavailable
from grokmoe.trace_context import MAX_TRACES
from grokmoe.tracing import ExportSettings, TraceSettings, Tracing, caller_metadata
from router.experts.call_record import CallRecord, straggler
from router.step_traces import DETAILED_STEPS, StepTraces
from tests import goldens
from tests.router.served import Served, service
from tests.router.tiny import CONFIG, ExpertDouble, until

NUM_TOKENS = DETAILED_STEPS + 2


def test_nothing_is_loaded_where_nobody_asks() -> None:
    """Also where OpenTelemetry is installed: what is off costs nothing."""
    assert Tracing.open(TraceSettings(), "test") is None
    program = (
        "import sys, router.__main__, attention_worker.__main__, expert_worker.__main__, grokmoe.client;"
        "print(any('opentelemetry' in name for name in sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert told.stdout == "False\n"


def test_who_asks_without_the_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match="extra otel"):
        Tracing.open(TraceSettings(traces="http://127.0.0.1:1"), "test")


@pytest.mark.parametrize("changes", [{"trace_share": 1.5}, {"trace_share": -0.1}, {"traces": "collector:4317"}])
def test_what_cannot_be_set(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        TraceSettings(**changes).check_traces()


@given(st.lists(st.tuples(st.floats(0, 10), st.booleans()), max_size=8))
def test_the_straggler_is_who_answers_last(ends: list[tuple[float, bool]]) -> None:
    ends.sort()
    calls = [
        CallRecord(index, f"e:{index}", 1, 0.0, end, failure="" if is_answered else "lost")
        for index, (end, is_answered) in enumerate(ends)
    ]
    answered = [call for call in calls if not call.failure]
    found = straggler(calls)
    if len(answered) < 2:
        assert found is None
    else:
        assert found == (answered[-1], answered[-1].end - answered[-2].end)
        assert found[1] >= 0


def on_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__ = test.__name__
    return run


class Traced:
    """A service whose spans are kept here."""

    def __init__(self, served: Served, provider: Any, exporter: Any) -> None:
        self.served, self.provider, self._exporter = served, provider, exporter

    async def generate(self, metadata: Any = None, max_tokens: int = NUM_TOKENS) -> None:
        async with AsyncClient(self.served.address, timeout=60, metadata=metadata) as client:
            await client.generate(goldens.PROMPTS["len33"], max_tokens=max_tokens, ignore_eos=True)

    def spans(self) -> list[Any]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans() if span.name == name]


@contextlib.asynccontextmanager
async def traced(share: float = 1.0, doubles: list[ExpertDouble] | None = None) -> AsyncIterator[Traced]:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    exporter, provider = InMemorySpanExporter(), TracerProvider(ParentBased(TraceIdRatioBased(share)))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    links = doubles or [ExpertDouble(range(4)), ExpertDouble(range(4, 8))]
    async with service(expert_links=links) as served:
        served.engine.traces = StepTraces(Tracing(provider))
        assert served.engine.pool is not None
        served.engine.pool.on_layer.append(served.engine.traces.layer_done)
        yield Traced(served, provider, exporter)


@on_a_loop
async def test_a_request_is_part_of_its_callers_trace() -> None:
    async with traced(share=0.0) as here:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider

        caller = TracerProvider().get_tracer("caller").start_span("caller")  # another program's, as it were
        with trace.use_span(caller):
            await here.generate(caller_metadata)
        (request,) = here.named("request")
        assert request.parent.span_id == caller.get_span_context().span_id
        assert {span.context.trace_id for span in here.spans()} == {caller.get_span_context().trace_id}
        assert request.attributes["grokmoe.output_tokens"] == NUM_TOKENS
        assert request.attributes["grokmoe.steps"] == NUM_TOKENS

        phases = [here.named(name) for name in ("queue", "prefill", "decode")]
        (queue,), (prefill,), (decode,) = phases
        assert all(span.parent.span_id == request.context.span_id for (span,) in phases)
        assert queue.start_time <= queue.end_time <= prefill.end_time <= decode.end_time

        steps = here.named("step")
        assert len(steps) == NUM_TOKENS
        assert all(step.parent.span_id == request.context.span_id for step in steps)
        assert all(step.attributes["grokmoe.leg.expert"] > 0 for step in steps)

        detailed = [steps[0], steps[DETAILED_STEPS]]
        layers = here.named("layer")
        expected = [step.context.span_id for step in detailed for _ in range(CONFIG.num_layers)]
        assert [layer.parent.span_id for layer in layers] == expected
        by_layer: dict[int, list[Any]] = {layer.context.span_id: [] for layer in layers}
        for call in here.named("expert call"):
            by_layer[call.parent.span_id].append(call)
        for layer in layers:
            calls = by_layer[layer.context.span_id]
            assert calls
            assert all(layer.start_time <= call.start_time <= call.end_time <= layer.end_time for call in calls)
            if len(calls) > 1:
                last = max(calls, key=lambda call: call.end_time)
                assert layer.attributes["grokmoe.straggler"] == last.attributes["grokmoe.worker"]


@on_a_loop
async def test_a_caller_decides_for_its_own() -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0"
    async with traced(share=1.0) as here:
        await here.generate({"traceparent": parent + "0"}, max_tokens=2)
        assert not here.spans()
        await here.generate({"traceparent": "nonsense"}, max_tokens=2)
        (request,) = here.named("request")
        assert request.parent is None
    async with traced(share=0.0) as here:
        await here.generate(max_tokens=2)
        assert not here.spans()
        await here.generate({"traceparent": parent + "1"}, max_tokens=2)
        assert {f"{span.context.trace_id:032x}" for span in here.spans()} == {parent.split("-")[1]}


@on_a_loop
async def test_a_call_that_failed_is_in_the_trace() -> None:
    doubles = [ExpertDouble(), ExpertDouble()]
    async with traced(doubles=doubles) as here:
        doubles[0].is_up = False
        await here.generate(max_tokens=2)
        failed = [call for call in here.named("expert call") if not call.status.is_ok]
        assert [call.status.description for call in failed] == ["lost"]
        assert failed[0].attributes["grokmoe.worker"] == doubles[0].address
        assert not here.named("request")[0].status.description


@on_a_loop
async def test_of_many_traced_requests_some_have_details() -> None:
    """A step's message cannot name hundreds of traces, nor need hundreds of copies of its spans be written."""
    async with traced() as here:
        await asyncio.gather(*(here.generate(max_tokens=2) for _ in range(3 * MAX_TRACES)))
        traces = {span.context.trace_id for span in here.named("request")}
        assert len(traces) == 3 * MAX_TRACES
        by_trace = {trace: [span for span in here.spans() if span.context.trace_id == trace] for trace in traces}
        for spans in by_trace.values():
            assert len([span for span in spans if span.name == "step"]) == 2
        calls = {span.context.span_id for span in here.named("expert call")}
        for call in calls:
            assert 1 <= len([span for span in here.named("expert call") if span.context.span_id == call]) <= MAX_TRACES


@on_a_loop
async def test_a_step_that_failed_is_in_the_trace() -> None:
    async with traced() as here:
        (cell,) = here.served.engine.cells
        step, num_calls = cell.link.step, 0

        async def lost_once(*arguments: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == 1:
                raise Unavailable("gone")
            return await step(*arguments)

        cell.link.step = lost_once  # type: ignore[method-assign]
        await here.generate(max_tokens=2)
        steps = here.named("step")
        assert [span.status.description for span in steps] == ["gone", None, None]
        assert not here.named("request")[0].status.description


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "nonsense",
        f"00-{'0' * 32}-{'1' * 16}-01",
        f"00-{'a' * 32}-{'0' * 16}-01",
        f"00-{'a' * 32}-{'1' * 16}-00",
        f"00-{'A' * 32}-{'1' * 16}-01",
        "00-" + "ü" * 32,
        "x" * 10_000,
    ],
)
def test_a_worker_writes_nothing_for_what_is_no_sampled_parent(traceparent: str) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    tracing = Tracing(TracerProvider(ParentBased(TraceIdRatioBased(ExportSettings().share_begun))))
    good = f"00-{'a' * 32}-{'b' * 16}-01"
    (span,) = tracing.under([traceparent, good], "work", 0.0)
    assert span.trace_id == "a" * 32
    assert len(list(tracing.under([good] * 100, "work", 0.0))) == MAX_TRACES


@on_a_loop
async def test_a_client_that_leaves_ends_the_trace() -> None:
    async with traced() as here, AsyncClient(here.served.address, timeout=60) as client:
        stream = client.stream(goldens.PROMPTS["len33"], max_tokens=40, ignore_eos=True)
        await anext(aiter(stream))
        await stream.aclose()
        await until(lambda: bool(here.named("request")))
        assert here.named("request")[0].attributes["grokmoe.output_tokens"] < 40
