"""What is compared with AIPerf, from its own records."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.crosscheck.figures import LATENCIES, STATISTICS, compare, of_aiperf, of_ours
from benchmarks.crosscheck.tools import prompts
from loadtest.record import Outcome, RequestRecord


def aiperf_record(start: float, first: float, gap: float, latency: float) -> dict[str, object]:
    """A line of its profile_export.jsonl, cut short."""
    values = {"time_to_first_token": first, "inter_token_latency": gap, "request_latency": latency}
    return {
        "metadata": {"request_start_ns": int(start * 1e9)},
        "metrics": {name: {"value": value, "unit": "ms"} for name, value in values.items()},
    }


def test_of_aiperf_the_requests_of_the_common_time_count() -> None:
    records = [aiperf_record(at, at, 2.0, 100.0) for at in (1.0, 5.0, 6.0, 9.0)]
    records[2]["metrics"].pop("inter_token_latency")  # type: ignore[attr-defined]
    found = of_aiperf(records, 4.0, 8.0)
    assert found == {"TTFT": [5.0, 6.0], "TPOT": [2.0], "end to end": [100.0, 100.0]}


def test_ours_counts_from_the_send_to_the_last_token() -> None:
    record = RequestRecord(0, 1.0, 1.0, 1.5, [2.0, 2.5, 4.0], [2, 1, 2], 9.0, Outcome.COMPLETED)
    failed = RequestRecord(1, 1.0)
    found = of_ours([record, failed])
    assert found == {"TTFT": [500.0], "TPOT": [pytest.approx(2000 / 3)], "end to end": [2500.0]}


def sample(seed: int, mean: float) -> dict[str, list[float]]:
    rng = np.random.default_rng(seed)
    return {name: list(rng.normal(mean, 2.0, 300)) for name in LATENCIES}


def test_tools_that_differ_by_the_hop_agree_and_others_do_not() -> None:
    around, through = sample(1, 50.0), sample(2, 53.0)
    found = compare(sample(3, 20.0), sample(4, 23.0), around, through)
    assert len(found) == len(LATENCIES) * len(STATISTICS)
    assert sum(each.agrees for each in found) >= len(found) - 1, "one of nine may be outside of its 95 %"
    for each in found:
        assert each.left == pytest.approx(each.theirs - each.ours - each.hop)
        assert each.interval.low < each.left < each.interval.high
    apart = compare(sample(3, 20.0), sample(4, 26.0), around, through)
    assert not any(each.agrees for each in apart)


def test_no_two_prompts_begin_alike() -> None:
    """Neither of one tool nor of two: the prefix cache would help the second."""
    texts = prompts(50, 8, 1) + prompts(50, 8, 2)
    assert len({text.split()[0] for text in texts}) == 100
    assert prompts(5, 8, 1) == prompts(5, 8, 1)
