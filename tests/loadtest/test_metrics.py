"""Every formula against a case worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokmoe.errors import ConfigError
from loadtest import latencies
from loadtest.metrics import concurrency, measure, schedule_lag, select, summarize, throughput, tokens_per_second
from loadtest.record import Outcome, RequestRecord, read_records, write_records
from loadtest.slo import Slo, parse_slo
from loadtest.window import Window, steady, whole
from tests.loadtest.records import completed

LATE = completed(1.0, [3.0, 3.5, 4.5, 5.0], [2, 1, 3, 1], woken=1.1, sent=1.25, end=5.25, server_queue=0.5)
"""Due at 1, turned to at 1.1, sent at 1.25; seven tokens in four messages from 3 to 5; ended at 5.25."""


def test_the_latencies_of_one_request() -> None:
    assert latencies.ttft(LATE) == 2.0
    assert latencies.ttft_sent(LATE) == 1.75
    assert latencies.tpot(LATE) == pytest.approx(2.0 / 5)  # seven tokens less the first message's two
    assert latencies.itls(LATE) == [0.5, 1.0, 0.5]
    assert latencies.e2el(LATE) == 4.25
    assert latencies.e2el_sent(LATE) == 4.0
    assert latencies.ntpot(LATE) == pytest.approx(4.25 / 7)
    assert latencies.server_queue(LATE) == 0.5
    assert latencies.client_queue_time(LATE) == pytest.approx(0.15)
    assert LATE.lag == pytest.approx(0.1)


def test_with_one_token_per_message_tpot_is_the_usual_one() -> None:
    record = completed(0.0, [1.0, 1.1, 1.2, 1.5])
    assert latencies.tpot(record) == pytest.approx((1.5 - 1.0) / 3)


def test_a_single_message_has_no_tpot() -> None:
    assert latencies.tpot(completed(0.0, [1.0], [5])) is None
    assert latencies.itls(completed(0.0, [1.0], [5])) == []


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.CANCELLED, Outcome.INCOMPLETE])
def test_who_did_not_complete_has_no_latency(outcome) -> None:
    record = completed(0.0, [1.0, 2.0], outcome=outcome)
    assert not any(latency(record) for latency in latencies.PER_REQUEST.values())
    assert latencies.itls(record) == []
    assert latencies.cancel(record) == (2.0 if outcome is Outcome.CANCELLED else None)


def test_summaries_are_in_milliseconds() -> None:
    assert summarize("x", [0.001, 0.002, 0.003, 0.004], [50, 99.9]) == pytest.approx(
        {
            "mean_x_ms": 2.5,
            "median_x_ms": 2.5,
            "std_x_ms": 1.25**0.5,
            "p50_x_ms": 2.5,
            "p99.9_x_ms": 3.997,
        }
    )
    assert summarize("x", []) == {}


RUN = [
    completed(0.0, [0.5, 1.0], index=0),
    completed(1.0, [1.5, 2.5], index=1),
    completed(2.0, [4.0, 4.5], index=2),
    RequestRecord(3, 3.0, 3.0, 3.0, end=3.2, outcome=Outcome.FAILED, code="UNAVAILABLE", reason="QUEUE_FULL"),
    RequestRecord(4, 4.0, 4.0, 4.0, [4.5], [1], end=6.0, outcome=Outcome.CANCELLED),
]


def test_throughput_counts_what_came_in_the_window() -> None:
    found = throughput(RUN, Window(1.0, 4.25))
    # Tokens at 1.0, 1.5, 2.5, 4.0; requests 0 and 1 ended in it, with ten tokens in each.
    assert found["total_output_tokens"] == 4
    assert found["output_throughput"] == pytest.approx(4 / 3.25)
    assert found["request_throughput"] == pytest.approx(2 / 3.25)
    assert found["total_token_throughput"] == pytest.approx((20 + 4) / 3.25)
    assert found["max_concurrent_requests"] == 2


def test_concurrency() -> None:
    levels = [(0.0, 1), (1.0, 1), (2.0, 2), (2.5, 1), (3.0, 2), (3.2, 1), (4.0, 2), (4.5, 1), (6.0, 0)]
    assert concurrency(RUN) == levels


def test_tokens_per_second() -> None:
    assert tokens_per_second(RUN, Window(0.0, 5.0)) == [1, 2, 1, 0, 3]


def test_the_whole_of_it() -> None:
    figures = measure(RUN, whole(RUN), Slo((("ttft", 1.0),), 0.5), [50])
    assert figures["duration"] == 6.0
    assert (figures["scheduled"], figures["completed"], figures["failed"], figures["cancelled"]) == (5, 3, 1, 1)
    assert figures["errors_by_code"] == {"UNAVAILABLE": 1}
    assert figures["errors_by_reason"] == {"QUEUE_FULL": 1}
    assert figures["request_goodput"] == pytest.approx(2 / 6)
    assert figures["slo_attained"] == 0.5  # of four: who left on purpose is not judged
    assert figures["slo_holds"]
    assert figures["p50_ttft_ms"] == 500.0
    assert figures["mean_cancel_ms"] == 2000.0


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.001, 10)), min_size=1, max_size=40))
def test_a_whole_run_leaves_nothing_out(times) -> None:
    records = [completed(begin, [begin + length], index=index) for index, (begin, length) in enumerate(times)]
    figures = measure(records, whole(records), Slo(()), [50])
    assert figures["scheduled"] == figures["completed"] == figures["total_output_tokens"] == len(records)
    assert figures["request_throughput"] * figures["duration"] == pytest.approx(len(records))


def test_the_steady_window_is_of_the_schedule() -> None:
    window = steady(RUN, 0.25, 0.75)
    assert (window.begin, window.end) == (1.0, 3.0)
    assert [record.index for record in select(RUN, window).records] == [1, 2]
    assert steady(RUN, 0.0, 1.0) == whole(RUN)
    with pytest.raises(ConfigError):
        steady(RUN, 0.5, 0.5)


def test_the_lag_of_the_harness() -> None:
    records = [RequestRecord(index, 1.0, 1.0 + index / 1000) for index in range(101)]
    assert schedule_lag(records) == pytest.approx(
        {"median_schedule_lag_ms": 50.0, "p99_schedule_lag_ms": 99.0, "max_schedule_lag_ms": 100.0}
    )


def test_objectives() -> None:
    slo = parse_slo(["ttft:2000", "tpot:200"])
    assert slo.is_good(completed(0.0, [2.0, 2.125]))
    assert not slo.is_good(completed(0.0, [2.1, 2.2]))
    assert not slo.is_good(completed(0.0, [1.0, 1.3]))
    assert slo.is_good(completed(0.0, [1.0]))  # no TPOT
    assert not slo.is_good(completed(0.0, [1.0], outcome=Outcome.FAILED))


@pytest.mark.parametrize("pair", ["itl:5", "ttft", "ttft:soon", "tpot:-1", "ttft:nan"])
def test_objectives_that_cannot_be(pair) -> None:
    with pytest.raises(ConfigError):
        parse_slo([pair])


def test_records_survive_their_file(tmp_path: Path) -> None:
    write_records(tmp_path / "r", [LATE, *RUN])
    assert read_records(tmp_path / "r") == [LATE, *RUN]
    (tmp_path / "r").write_text('{"index": 1}\n')
    with pytest.raises(ConfigError):
        read_records(tmp_path / "r")
