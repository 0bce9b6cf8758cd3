"""Reads Prometheus endpoints every now and then while the load runs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from prometheus_client.parser import text_string_to_metric_families

from grokmoe.errors import ConfigError

TIMEOUT = 2.0
"""Seconds that one reading may take."""

PREFIXES = ("grokmoe_", "process_cpu_seconds", "process_resident_memory_bytes")
"""What is kept of an endpoint's metrics."""

Key = tuple[str, tuple[tuple[str, str], ...]]
"""Name of a sample and its labels, in order."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """All kept values of one endpoint at one time, seconds of the monotonic clock. kinds: of each metric family."""

    time: float
    values: dict[Key, float]
    kinds: dict[str, str]


def parse_reading(text: str, now: float) -> Reading:
    """Text in Prometheus' format. ValueError: it is not."""
    values: dict[Key, float] = {}
    kinds = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith(PREFIXES):
            continue
        kinds[family.name] = family.type
        for sample in family.samples:
            values[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return Reading(now, values, kinds)


def endpoint_url(text: str) -> str:
    """`host:port` and `http://host:port` mean `http://host:port/metrics`."""
    if not text:
        raise ConfigError("metrics_url is empty")
    url = text if "://" in text else f"http://{text}"
    return url if url.count("/") > 2 else f"{url}/metrics"


class Scraper:
    """Reads `urls` every `interval` seconds for as long as the `async with` block lasts, first and last of all too.

    readings: of each URL, by time. failures: of each URL, how many readings did not come, such as of a killed worker.
    """

    def __init__(self, urls: Sequence[str], interval: float, others: Sequence[str] = ()) -> None:
        """urls: must answer at the beginning, or ConfigError. others: may be gone, such as a killed worker's."""
        self._interval = interval
        self._needed = frozenset(map(endpoint_url, urls))
        self.readings: dict[str, list[Reading]] = {endpoint_url(url): [] for url in (*urls, *others)}
        self.failures = dict.fromkeys(self.readings, 0)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Scraper:
        await self._read_all()
        for url in self._needed:
            if not self.readings[url]:
                raise ConfigError(f"metrics_url {url} does not answer")
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None, "entered"
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._read_all()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self._read_all()

    async def _read_all(self) -> None:
        await asyncio.gather(*(self._read(url) for url in self.readings))

    async def _read(self, url: str) -> None:
        try:
            text = await asyncio.to_thread(_fetch, url)
            self.readings[url].append(parse_reading(text, time.monotonic()))
        except (OSError, ValueError, urllib.error.URLError):
            self.failures[url] += 1


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        data: bytes = answer.read()
    return data.decode()
