"""The HTTP port of a router: its page, the state behind it, and metrics under every other path."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.error
import urllib.request
from http.client import HTTPResponse
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from grokmoe.metrics_http import start_http
from grokmoe.telemetry import RouterMetrics, new_registry
from router.status_page import PAGE, status_pages
from router.vllm_aliases import ALIASES, VllmAliases
from tests import goldens
from tests.router.served import service
from tests.router.tiny import CONFIG, ExpertDouble


def get(url: str, method: str = "GET") -> tuple[HTTPResponse, bytes]:
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=30) as answer:
        return answer, answer.read()


async def fetched(url: str, method: str = "GET") -> tuple[HTTPResponse, bytes]:
    return await asyncio.to_thread(get, url, method)


def test_the_state_is_that_of_the_engine() -> None:
    async def look() -> None:
        async with service(expert_links=[ExpertDouble(range(4)), ExpertDouble(range(4, 8))]) as served:
            port = start_http("127.0.0.1", 0, new_registry(), status_pages(served.engine, "tiny"))
            url = f"http://127.0.0.1:{port}"
            await served.client.generate(goldens.PROMPTS["len33"], max_tokens=4, ignore_eos=True)
            answer, body = await fetched(f"{url}/status.json")
            assert answer.headers["Content-Type"] == "application/json"
            told: dict[str, Any] = json.loads(body)
            assert (told["model"], told["is_serving"], told["prompt_tokens"]) == ("tiny", True, 33)
            assert told["generated_tokens"] == 4
            assert told["rows"] == served.engine.counter.rows_LE
            assert [len(row) for row in told["rows"]] == [CONFIG.num_experts] * CONFIG.num_layers
            assert [worker["state"] for worker in told["workers"]] == ["WORKER_STATE_READY"] * 3
            whole = {"expert": 0, "layer_begin": 0, "layer_end": CONFIG.num_layers, "slice": 0, "num_slices": 0}
            assert told["workers"][1]["held"][0] == whole

            answer, body = await fetched(f"{url}/")
            assert body == PAGE.read_bytes()
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            assert (await fetched(f"{url}/", "HEAD"))[1] == b""
            with pytest.raises(urllib.error.HTTPError, match="405"):
                await fetched(f"{url}/", "POST")
            assert b"grokmoe_build_info" in (await fetched(f"{url}/metrics"))[1]

    asyncio.run(look())


def test_the_page_is_self_contained() -> None:
    text = PAGE.read_text()
    assert not re.findall(r"(?:src|href|url)\s*[=(]", text)
    assert set(re.findall(r"fetch\(\"([^\"]+)\"", text)) == {"status.json"}
    assert "innerHTML" not in text, "what others have written must not become markup"


def test_a_page_that_fails_says_so_and_metrics_go_on() -> None:
    def broken() -> bytes:
        raise TimeoutError

    port = start_http("127.0.0.1", 0, new_registry(), {"/": ("text/html", broken)})
    with pytest.raises(urllib.error.HTTPError, match="503"):
        get(f"http://127.0.0.1:{port}/")
    assert b"grokmoe_build_info" in get(f"http://127.0.0.1:{port}/metrics")[1]


def test_vllms_names_have_our_values() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    metrics.generated_tokens.inc(7)
    metrics.time_to_first_token.observe(0.5)
    for state, pages in (("used", 3), ("cached", 1), ("free", 4)):
        metrics.kv_pages.labels("0", state).set(pages)
    others = CollectorRegistry()
    others.register(VllmAliases(metrics, "tiny"))
    labels = {"model_name": "tiny"}
    assert others.get_sample_value("vllm:generation_tokens_total", labels) == 7
    assert others.get_sample_value("vllm:time_to_first_token_seconds_count", labels) == 1
    assert others.get_sample_value("vllm:time_to_first_token_seconds_bucket", {**labels, "le": "0.5"}) == 1
    assert others.get_sample_value("vllm:kv_cache_usage_perc", labels) == 3 / 8
    ours = {family.name for family in registry.collect()}
    assert set(ALIASES) <= ours, "an alias of nothing"
    assert {family.name for family in others.collect()} == {*ALIASES.values(), "vllm:kv_cache_usage_perc"}
