"""Past one cell, for real: the pods of the profile `laptop-cells` as processes. Two cells share four expert workers
behind one OpenAI address; under load one cell is drained and started again, the other is lost, no request fails."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("smg")
pytest.importorskip("smg_grpc_proto")

from grokmoe import Client
from tests.deploy.local_pods import Cluster, Pod
from tests.deploy.rendered import objects_of, profile
from tests.deploy.test_pods_run import metrics, run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

PROMPTS = [
    f"HAMLET.\nTo be, or not to be, said the {name}" for name in ("king", "queen", "fool", "ghost", "duke", "lord")
]
NUM_TOKENS = 24
NUM_CALLERS = 6

LOADED = 3.0
"""Seconds of load before and after something happens."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for Unix sockets, which pytest's own is not."""
    made = Path(tempfile.mkdtemp(prefix="cells-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


class Load:
    """Callers that ask one after another, each for text that is known; what they got instead is kept."""

    def __init__(self, ask: Callable[[str], str], expected: dict[str, str]) -> None:
        self._ask, self._expected = ask, expected
        self.num_answered = 0
        self.wrong: list[str] = []
        self._is_over = threading.Event()
        self._callers = [threading.Thread(target=self._call, args=(number,)) for number in range(NUM_CALLERS)]
        for caller in self._callers:
            caller.start()

    def _call(self, number: int) -> None:
        for prompt in itertools.islice(itertools.cycle(PROMPTS), number, None):
            if self._is_over.is_set():
                return
            try:
                text = self._ask(prompt)
            except Exception as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
                time.sleep(0.1)
                continue
            self.num_answered += 1
            if text != self._expected[prompt]:
                self.wrong.append(f"{text!r} for {prompt!r}")

    def goes_on(self, seconds: float = LOADED) -> None:
        """Lets it run for a while; fails if nothing was answered."""
        before = self.num_answered
        time.sleep(seconds)
        deadline = time.monotonic() + 60
        while self.num_answered < before + NUM_CALLERS:
            assert time.monotonic() < deadline, "no answers any more"
            time.sleep(0.1)

    def end(self) -> None:
        """Returns when every caller has its last answer."""
        self._is_over.set()
        for caller in self._callers:
            caller.join(120)
            assert not caller.is_alive()


def value(text: str, sample: str) -> float:
    """Sum of a metric's samples; 0 if it has none."""
    return sum(float(found) for found in re.findall(rf"^{re.escape(sample)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))


def router_of(cluster: Cluster, cell: str) -> Pod:
    (found,) = [pod for pod in cluster.of("router") if pod.labels["grokmoe/cell"] == cell]
    return found


def requests_of(pod: Pod) -> float:
    return value(metrics(pod.address, 9091), "grokmoe_requests_total")


def shared_batches(cluster: Cluster) -> tuple[float, float, float]:
    """Of all expert workers: grouped GEMMs, those with rows of more than one router, and their rows' mean."""
    texts = [metrics(pod.address, 9093) for pod in cluster.of("expert")]
    name = "grokmoe_expert_worker_batch_callers"
    count = sum(value(text, f"{name}_count") for text in texts)
    alone = sum(float(found) for text in texts for found in re.findall(rf'{name}_bucket{{le="1.0"}} (\S+)', text))
    return count, count - alone, sum(value(text, f"{name}_sum") for text in texts) / count


def openai(address: str) -> Callable[[str], str]:
    def ask(prompt: str) -> str:
        body = {"model": "demo_model", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://{address}/v1/completions", json.dumps(body).encode(), headers={"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(json.load(answer)["choices"][0]["text"])

    return ask


def streamed(client: Client) -> Callable[[str], str]:
    """Token by token, going on at the other cell when the one is lost in the middle."""

    def ask(prompt: str) -> str:
        with client.stream(prompt, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, resume=True) as stream:
            return "".join(delta.text for delta in stream)

    return ask


def test_two_cells_share_experts_and_no_request_fails(folder: Path) -> None:
    cluster = Cluster(objects_of(profile("laptop-cells")), folder)
    loads: list[Load] = []
    try:
        run(cluster)
        (gateway,) = cluster.of("openai")
        cluster.start(gateway)
        cluster.wait_started(gateway)
        cluster.wait(gateway, "readinessProbe", True)
        first, second = router_of(cluster, "0"), router_of(cluster, "1")
        assert len(cluster.of("expert")) == 4

        addresses = [f"{router.address}:50051" for router in (first, second)]
        expected = {}
        with Client(addresses[0]) as one, Client(addresses[1]) as other:
            for prompt in PROMPTS:
                options = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
                expected[prompt] = one.generate(prompt, **options).text  # type: ignore[arg-type]
                assert other.generate(prompt, **options).text == expected[prompt]  # type: ignore[arg-type]

        ask = openai(cluster.service("demo-grokmoe-openai", 8000))
        with Client(addresses) as client:
            loads = [Load(ask, expected), Load(streamed(client), expected)]
            for load in loads:
                load.goes_on()
            assert all(requests_of(router) > len(PROMPTS) for router in (first, second)), "both cells have work"

            # Rows of both cells for one layer have met in one grouped GEMM.
            count, shared, mean = shared_batches(cluster)
            assert shared > 0, f"{count} grouped GEMMs, none of them with rows of both routers"
            assert mean > 1

            # One is drained, as in an upgrade, and is back.
            assert cluster.delete(first) == {"router": 0}
            for load in loads:
                load.goes_on()
            cluster.start(first)
            cluster.wait_started(first)
            cluster.wait(first, "readinessProbe", True)
            for load in loads:
                load.goes_on()
            deadline = time.monotonic() + 60
            while not requests_of(first):
                assert time.monotonic() < deadline, "the cell that is back gets no work"
                time.sleep(0.2)

            # The other is lost, with all that it was about.
            cluster.lose(second)
            (attention,) = [pod for pod in cluster.of("attention") if pod.labels["grokmoe/cell"] == "1"]
            cluster.lose(attention)
            for load in loads:
                load.goes_on()
                load.end()
        for load in loads:
            assert load.wrong == []
            assert load.num_answered > NUM_CALLERS
    finally:
        for load in loads:
            load.end()
        cluster.kill()
