"""The reports: whole, well-formed, with nothing from outside, and true to the result."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.chart import MOST_POINTS, Series, chart, thin
from loadtest.explain import FORMULAS, explain
from loadtest.heat_map import heat_map
from loadtest.latencies import PER_REQUEST
from loadtest.plots import cumulative, labels_of
from loadtest.record import Outcome
from loadtest.report import to_html, to_markdown
from loadtest.result import detailed
from loadtest.scale import Axis, log_ticks, ticks
from loadtest.settings import LoadSettings
from loadtest.tables import sweep_table
from tests.loadtest.records import result_of, steady_run

VLLM_KEYS = """date backend endpoint_type label model_id tokenizer_id num_prompts request_rate burstiness
max_concurrency
duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput output_throughput
total_token_throughput max_output_tokens_per_s max_concurrent_requests mean_ttft_ms median_ttft_ms std_ttft_ms
p99_ttft_ms mean_tpot_ms median_tpot_ms std_tpot_ms p99_tpot_ms mean_itl_ms median_itl_ms std_itl_ms p99_itl_ms
mean_e2el_ms median_e2el_ms std_e2el_ms p99_e2el_ms""".split()  # noqa: SIM905
"""What `vllm bench serve --save-result` writes for a generative model."""

DETAILED_KEYS = {"input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times", "errors"}


def a_result():
    records = steady_run(60)
    records[5].outcome, records[5].code, records[5].reason = Outcome.FAILED, "UNAVAILABLE", "<b>&"
    result = result_of(records, LoadSettings(request_rate=5.0, num_prompts=60, label="<script>alert(1)</script>"))
    result["server_metrics"] = {
        "endpoints": {"http://h/metrics": {"counters": {"c": 3.0}, "gauges": {}, "histograms": {}}},
        "series": {
            "grokmoe_requests_running": [[0.0, 1.0], [5.0, 4.0]],
            'grokmoe_kv_pages{state="used"}': [[0.0, 1.0]],
        },
        "experts": {"times": [0.0, 1.0, 2.0], "rows": {"0": [5.0, 1.0], "1": [0.0, 9.0]}},
    }
    step = {name: result[name] for name in result if name not in ("whole_run", "confidence_intervals")}
    steps = [{**step, "request_rate": rate, "holds": rate < 5, "request_goodput": rate} for rate in (4.0, 8.0)]
    result["sweep"] = {"held": 4.0, "failed": 8.0, "steps": steps}
    result["faults"] = [
        {
            "fault": "kill:expert:1@3s",
            "at": 3.0,
            "requests_under_way": 2,
            "requests_lost": 0,
            "changed": 0,
            "compared": 59,
            "longest_stall_ms": 210.0,
            "slo_attained": 1.0,
            "slo_attained_undisturbed": 1.0,
            "tokens_per_s_dip": 0.4,
            "recovery_seconds": None,
        }
    ]
    return result, records


class Page(HTMLParser):
    """Checks that every element is closed, in order."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_alone() -> None:
    page = to_html(*a_result())
    parser = Page()
    parser.feed(page)
    assert parser.open == []
    assert parser.seen.count("svg") == 13
    assert not {"script", "link", "img", "iframe", "object"} & set(parser.seen)
    assert not re.search(r"(?:src|href)=|url\(|@import|https?://(?!h/metrics)", page)
    assert "prefers-color-scheme: dark" in page
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(picture)


def test_the_page_says_what_the_result_does() -> None:
    result, records = a_result()
    page = to_html(result, records)
    (raw,) = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    told = json.loads(html.unescape(raw))
    assert told["mean_ttft_ms"] == result["mean_ttft_ms"]
    lost = "kill:expert:1@3s: 0 of 2 requests under way were lost, 0 of 59 got other tokens"
    for text in (lost, "The objectives hold up to 4 requests/s, and fail at 8.", "code UNAVAILABLE"):
        assert text in html.unescape(page)


def test_a_page_of_a_run_in_which_nothing_completed() -> None:
    records = steady_run(5)
    for record in records:
        record.outcome, record.arrivals, record.counts = Outcome.FAILED, [], []
    result = result_of(records)
    assert result["invalid_because"] == "no request completed"
    assert "INVALID" in to_html(result, records)
    assert "INVALID" in to_markdown(result)


def test_markdown_has_the_tables() -> None:
    text = to_markdown(a_result()[0])
    assert text.startswith("# grokmoe loadtest: <script>")
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith(" |")
    assert "| TTFT |" in text


def test_the_result_has_the_names_that_vllms_has() -> None:
    records = steady_run()
    result = result_of(records, LoadSettings(request_rate=5.0, save_detailed=True, metadata=("tp=1",)))
    assert set(VLLM_KEYS) | DETAILED_KEYS | {"tp"} <= result.keys()
    assert json.loads(json.dumps(result, allow_nan=False))["request_rate"] == 5.0
    assert detailed(records)["ttfts"][0] == pytest.approx(records[0].arrivals[0])


def test_the_run_is_invalid_when_the_harness_was_late() -> None:
    records = steady_run(100)
    for record in records[:3]:
        record.woken += 0.05
    settings = LoadSettings(request_rate=5.0)
    assert "late" in result_of(records, settings)["invalid_because"]
    assert result_of(records, LoadSettings(request_rate=5.0, max_lag_ms=60.0))["valid"]
    # Of a closed loop nothing was due at a time.
    assert result_of(records, LoadSettings(max_concurrency=4))["valid"]


def test_every_latency_is_explained() -> None:
    told = explain()
    for name in (*PER_REQUEST, "itl", "request_goodput", "output_throughput"):
        assert name in told
    assert all(text for _, text in FORMULAS)


@given(low=st.floats(-1e6, 1e6), extra=st.floats(1e-3, 1e6))
def test_ticks_cover_the_range_in_even_steps(low, extra) -> None:
    found = ticks(low, low + extra)
    assert found[0] <= low + 1e-6 * extra
    assert found[-1] >= low + extra * (1 - 1e-6)
    assert 2 <= len(found) <= 13


@given(low=st.floats(1e-3, 1e5), factor=st.floats(1.0, 1e6))
def test_log_ticks_cover_the_range(low, factor) -> None:
    found = log_ticks(low, low * factor)
    assert found == sorted(found)
    assert found[0] <= low * 1.001
    assert found[-1] >= low * factor * 0.999


def test_thinning_keeps_the_extremes() -> None:
    points = [(float(index), float(index % 97)) for index in range(20_000)]
    points[777] = (777.0, 1e6)
    points[778] = (778.0, -1e6)
    kept = thin(points)
    assert len(kept) <= MOST_POINTS + 2
    assert {(777.0, 1e6), (778.0, -1e6)} <= set(kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_a_distribution_ends_at_one() -> None:
    assert cumulative([0.002, 0.001]) == [(1.0, 0.5), (2.0, 1.0)]
    many = cumulative([index / 1000 for index in range(5000)])
    assert len(many) == 400
    assert many[-1] == (4999.0, 1.0)


def test_lines_are_named_by_what_tells_them_apart() -> None:
    one = ['m{state="used",worker="0"}', 'm{state="free",worker="0"}']
    assert labels_of(one) == ["used", "free"]
    assert labels_of([*one, 'm{state="free",worker="1"}']) == ["used, worker 0", "free, worker 0", "free, worker 1"]
    assert labels_of(['m{state="used"}']) == ['m{state="used"}'], "alone, it keeps its name"
    assert labels_of([]) == []


def test_a_sweep_is_listed_by_rate() -> None:
    result, _ = a_result()
    result["sweep"]["steps"].reverse()
    assert [row[0] for row in sweep_table(result).rows] == ["4", "8"]


def test_nothing_to_draw_is_no_chart() -> None:
    assert chart("t", Axis("x"), Axis("y"), [Series("s", [])]) == ""
    assert heat_map("t", [1.0], {"0": []}, "x", "y") == ""


def test_one_point_is_a_chart() -> None:
    assert "<svg" in chart("t", Axis("x"), Axis("y", True), [Series("s", [(1.0, 5.0)])])
