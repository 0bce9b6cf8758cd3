"""Reading Prometheus endpoints, and what their values say of a window."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry, start_http_server

from grokmoe.errors import ConfigError
from grokmoe.telemetry import RouterMetrics
from loadtest.scrape import Scraper, endpoint_url, parse_reading
from loadtest.server_view import quantile, view


def reading(now: float, running: int, rows: dict[str, int], waits: list[float]):
    from prometheus_client import generate_latest

    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    metrics.running.set(running)
    for expert, count in rows.items():
        metrics.expert_rows.labels(expert).inc(count)
    for wait in waits:
        metrics.queue_time.observe(wait)
    return parse_reading(generate_latest(registry).decode(), now)


READINGS = [
    reading(100.0, 1, {"0": 10, "1": 0}, []),
    reading(101.0, 3, {"0": 20, "1": 4}, [0.5]),
    reading(103.0, 5, {"0": 20, "1": 8}, [0.5, 0.5, 0.7]),
]


def test_counters_are_differences_gauges_means_histograms_of_what_was_new() -> None:
    found = view({"u": READINGS}, 100.0, (0.0, 3.0))["endpoints"]["u"]
    assert found["seconds"] == 3.0
    assert found["counters"]['grokmoe_expert_rows_total{expert="0"}'] == 10
    assert found["gauges"]["grokmoe_requests_running"] == {"mean": 3.0, "max": 5.0}
    waits = found["histograms"]["grokmoe_request_queue_seconds"]
    assert waits["count"] == 3
    assert waits["mean"] == pytest.approx(1.7 / 3)
    assert 0.25 < waits["p50"] <= 0.5


def test_the_window_takes_the_readings_around_it() -> None:
    assert view({"u": READINGS}, 100.0, (0.2, 0.8))["endpoints"]["u"]["seconds"] == 1.0
    assert view({"u": READINGS}, 100.0, (0.5, 1.5))["endpoints"]["u"]["seconds"] == 3.0


def test_rows_per_expert_over_time() -> None:
    experts = view({"u": READINGS}, 99.0, (0.0, 9.0))["experts"]
    assert experts["times"] == [1.0, 2.0, 4.0]
    assert experts["rows"] == {"0": [10.0, 0.0], "1": [4.0, 2.0]}


def test_rows_of_a_worker_that_is_killed_end() -> None:
    experts = view({"u": READINGS, "killed": READINGS[:2]}, 100.0, (0.0, 3.0))["experts"]
    assert experts["rows"]["0"] == [20.0, 0.0]


def test_gauges_over_time() -> None:
    series = view({"u": READINGS}, 100.0, (0.0, 3.0))["series"]["grokmoe_requests_running"]
    assert series == [[0.0, 1.0], [1.0, 3.0], [3.0, 5.0]]


def test_nobody_to_ask_is_nothing_to_say() -> None:
    assert view({}, 0.0, (0.0, 1.0)) == {"endpoints": {}, "series": {}, "experts": {}}


def test_quantiles_are_linear_inside_a_bucket() -> None:
    buckets = [(1.0, 0.0), (2.0, 10.0), (4.0, 20.0), (float("inf"), 20.0)]
    assert quantile(buckets, 0.25) == 1.5
    assert quantile(buckets, 0.75) == 3.0
    assert quantile([(1.0, 0.0), (float("inf"), 5.0)], 0.5) == 1.0


def test_a_real_endpoint_is_read_before_during_and_after() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    server, thread = start_http_server(0, "127.0.0.1", registry)

    async def main() -> Scraper:
        scraper = Scraper([f"127.0.0.1:{server.server_port}"], 0.05)
        async with scraper:
            metrics.generated_tokens.inc(7)
            (readings,) = scraper.readings.values()
            async with asyncio.timeout(30):
                while len(readings) < 3:  # noqa: ASYNC110 - a list has no event
                    await asyncio.sleep(0.01)
        return scraper

    try:
        scraper = asyncio.run(main())
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    ((url, readings),) = scraper.readings.items()
    assert url.endswith("/metrics")
    assert len(readings) >= 4
    assert readings[-1].values["grokmoe_generated_tokens_total", ()] == 7
    assert scraper.failures[url] == 0


def test_an_endpoint_that_is_not_there_is_told_before_the_run() -> None:
    async def main() -> None:
        async with Scraper(["127.0.0.1:1"], 1.0):
            raise AssertionError("entered")

    with pytest.raises(ConfigError, match="does not answer"):
        asyncio.run(main())


def test_an_endpoint_that_may_be_gone_is_gone() -> None:
    async def main() -> Scraper:
        async with Scraper([], 1.0, ["127.0.0.1:1"]) as scraper:
            return scraper

    scraper = asyncio.run(main())
    assert scraper.failures == {"http://127.0.0.1:1/metrics": 2}
    assert view(scraper.readings, 0.0, (0.0, 1.0))["experts"] == {}


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("h:1", "http://h:1/metrics"),
        ("http://h:1", "http://h:1/metrics"),
        ("http://h:1/m", "http://h:1/m"),
    ],
)
def test_endpoints_are_urls_or_addresses(text: str, url: str) -> None:
    assert endpoint_url(text) == url
