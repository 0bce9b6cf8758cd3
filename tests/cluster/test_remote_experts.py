"""Experts elsewhere: `grokmoe serve --experts`, and rows by gloo, with workers that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from expert_worker.config import ExpertWorkerSettings
from grokmoe import Client, WorkerRole
from grokmoe.server import ServerSettings
from grokmoe.settings import to_flags
from tests import goldens
from tests.cluster.command import Command, running

pytestmark = pytest.mark.cluster

MODEL = ("--model", str(goldens.DIRECTORY), "--dtype", "float32")
SERVE = ("serve", *MODEL, "--port", "0", "--kv-gib", "0.001")


@contextlib.contextmanager
def workers(*addresses: str) -> Iterator[list[Command]]:
    """Expert workers that hold everything."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(worker(address)) for address in addresses]


@contextlib.contextmanager
def worker(address: str) -> Iterator[Command]:
    settings = ExpertWorkerSettings(model=str(goldens.DIRECTORY), dtype="float32", threads=1)
    flags = [*to_flags(settings), *to_flags(ServerSettings(listen=address))]
    with running(*flags, module="expert_worker") as command:
        command.wait_ready()
        yield command


def counter(metrics: str, name: str) -> float:
    """A counter without labels at a METRICS address."""
    text = urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10).read().decode()
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


def metrics_of(command: Command) -> str:
    return next(line.split()[1] for line in command.lines if line.startswith("METRICS "))


def generate(client: Client, prompt: str) -> list[int]:
    done = client.generate(goldens.PROMPTS[prompt], max_tokens=16, temperature=0, ignore_eos=True)
    return list(done.token_ids)


@pytest.mark.parametrize("transport", ["grpc", "gloo"])
def test_serve_with_experts_elsewhere(tmp_path: Path, transport: str) -> None:
    """One of two holders dies in the middle of a request, comes back, and then the other one does."""
    addresses = [f"unix:{tmp_path}/{name}" for name in "ab"]
    with workers(*addresses) as (first, second):
        flags = ("--experts", ",".join(addresses), "--expert-transport", transport, "--replica-wait", "60")
        with running(*SERVE, *flags) as serve, Client(serve.wait_ready()) as client:
            assert any(f"experts at {addresses[0]}" in line for line in serve.errors)
            for prompt in goldens.PROMPTS:
                assert generate(client, prompt) == goldens.greedy("seed", prompt)
            roles = [each.role for each in client.status().workers]
            assert (roles.count(WorkerRole.EXPERT), roles.count(WorkerRole.ATTENTION)) == (2, 1)
            assert (counter(metrics_of(serve), "grokmoe_expert_pair_calls_total") > 0) == (transport == "gloo")

            stream = client.stream(goldens.PROMPTS["len33"], max_tokens=16, temperature=0, ignore_eos=True)
            tokens = [*next(stream).token_ids]
            first.process.kill()
            tokens += [token for delta in stream for token in delta.token_ids]
            assert tokens == goldens.greedy("seed", "len33")
            first.wait()
            with worker(addresses[0]):
                second.process.kill()
                assert generate(client, "len70") == goldens.greedy("seed", "len70")
                assert serve.stop(signal.SIGTERM) == 0


def test_up_with_gloo_loses_a_worker(tmp_path: Path) -> None:
    state_file = tmp_path / "state.json"
    flags = ("--experts", "2", "--expert-replicas", "2", "--expert-transport", "gloo", "--state", str(state_file))
    with running("up", *MODEL, "--port", "0", "--kv-gib", "0.001", *flags) as up, Client(up.wait_ready()) as client:
        processes = json.loads(state_file.read_text())["processes"]
        router, *experts = [each for each in processes if each["role"] != "attention"]
        for prompt in goldens.PROMPTS:
            assert generate(client, prompt) == goldens.greedy("seed", prompt)
        before = counter(router["metrics"], "grokmoe_expert_pair_calls_total")
        assert before > 0
        os.kill(experts[1]["pid"], signal.SIGKILL)
        assert generate(client, "len70") == goldens.greedy("seed", "len70")
        deadline = time.monotonic() + 60
        while counter(router["metrics"], "grokmoe_expert_pair_calls_total") < before + 10:
            assert time.monotonic() < deadline, "rows to the other worker do not go by its pair"
            assert generate(client, "len7") == goldens.greedy("seed", "len7")
        assert up.stop() == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--experts", "127.0.0.1:1", "--join-timeout", "1"), "within 1"),
        (("--experts", "127.0.0.1:1", "--expert-dtype", "int8"), "expert workers have their own"),
        (("--experts", "127.0.0.1:1", "--expert-transport", "nccl"), "expert_transport is nccl"),
        (("--experts", "127.0.0.1:1", "--expert-transport", "gloo", "--pair-host", "x.invalid"), "cannot meet at"),
        (("--pair-port", "70000"), "pair_port is 70000"),
    ],
)
def test_impossible_settings_are_refused(flags: tuple[str, ...], words: str) -> None:
    with running(*SERVE, *flags) as serve:
        assert serve.wait() == 1
        assert words in "\n".join(serve.errors)
        assert "Traceback" not in "\n".join(serve.errors)
