"""What the gateway between AIPerf and the server adds: single requests, one through it and one past it in turn."""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
from collections.abc import Callable

from benchmarks.crosscheck.figures import Latencies, of_stamps
from benchmarks.crosscheck.tools import Load, prompts
from grokmoe import Client
from launcher.paths import DEMO_MODEL

Stamped = tuple[float, list[float], list[int]]
"""When a request was sent, when its tokens came, and how many each time."""


def probe(address: str, url: str, load: Load, seed: int, is_over: Callable[[], bool]) -> tuple[Latencies, Latencies]:
    """Past the gateway, and through it, until it is over. Every prompt is new: of a prompt sent again the server would
    have the prefix."""
    target = urllib.parse.urlsplit(url)
    texts = iter(prompts(100_000, load.words, seed))
    around: list[Stamped] = []
    through: list[Stamped] = []
    connection = http.client.HTTPConnection(target.hostname or "", target.port)
    with Client(address) as client:
        while not is_over():
            around.append(_past(client, next(texts), load.output_len))
            through.append(_through(connection, next(texts), load.output_len))
    connection.close()
    # The first of each opens its connection.
    return of_stamps(around[1:]), of_stamps(through[1:])


def _past(client: Client, text: str, num: int) -> Stamped:
    stamps: list[float] = []
    counts: list[int] = []
    sent = time.perf_counter()
    for delta in client.stream(text, max_tokens=num, temperature=0, ignore_eos=True):
        if delta.token_ids:
            stamps.append(time.perf_counter())
            counts.append(len(delta.token_ids))
    return sent, stamps, counts


def _through(connection: http.client.HTTPConnection, text: str, num: int) -> Stamped:
    """Events with text are tokens; the last one, with the reason for the end, has none."""
    body = {"model": DEMO_MODEL.name, "prompt": text, "max_tokens": num, "temperature": 0, "stream": True}
    body["ignore_eos"] = True
    stamps: list[float] = []
    sent = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        now = time.perf_counter()
        if line.startswith(b"data: {") and any(each["text"] for each in json.loads(line[6:])["choices"]):
            stamps.append(now)
    # Tokens without a text of their own are in no event: as many as were asked for are there in any case.
    return sent, stamps, [1] * (len(stamps) - 1) + [num - len(stamps) + 1]
