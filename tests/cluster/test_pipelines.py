"""`grokmoe up` with attention workers cut into stages: real processes, killed one by one in the middle of a text."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grokmoe import Client, Worker, WorkerRole, WorkerState
from tests import goldens
from tests.cluster.command import running
from tests.cluster.test_up import UP

pytestmark = pytest.mark.cluster

WAIT = 60.0
"""Seconds for a process to start on a busy machine."""

NUM_TOKENS = 300
"""Enough for a kill to fall into the middle; the first are the goldens'."""


class Stages:
    """The attention processes of a running cluster."""

    def __init__(self, state_file: Path) -> None:
        processes = json.loads(state_file.read_text())["processes"]
        self.listed = [each for each in processes if each["role"] == "attention"]
        self._commands = {each["address"]: _command(each["pid"]) for each in self.listed}
        self._pids = {each["address"]: each["pid"] for each in self.listed}
        self._started: list[subprocess.Popen[bytes]] = []

    def kill(self, address: str) -> None:
        os.kill(self._pids[address], signal.SIGKILL)

    def restart(self, address: str) -> None:
        """The same process anew."""
        # Its standard input stays open as long as this process lives.
        started = subprocess.Popen(self._commands[address], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self._started.append(started)
        self._pids[address] = started.pid

    def stop(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()


def _command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]


@contextlib.contextmanager
def cluster(tmp_path: Path, *flags: str) -> Iterator[tuple[Client, Stages]]:
    state_file = tmp_path / "state.json"
    with running(*UP, "--experts", "1", *flags, "--state", str(state_file)) as up:
        address = up.wait_ready()
        stages = Stages(state_file)
        try:
            with Client(address) as client:
                yield client, stages
        finally:
            stages.stop()
        assert up.stop() == 0


def attention(client: Client) -> list[Worker]:
    return [worker for worker in client.status().workers if worker.role is WorkerRole.ATTENTION]


def wait_until_ready(client: Client) -> None:
    deadline = time.monotonic() + WAIT
    while any(worker.state is not WorkerState.READY for worker in attention(client)):
        assert time.monotonic() < deadline, attention(client)
        time.sleep(0.05)


def ask(client: Client, **options: Any) -> Any:
    prompt = goldens.PROMPTS["len33"]
    return client.stream(prompt, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, **options)


def undisturbed(client: Client) -> list[int]:
    tokens = [token for delta in ask(client) for token in delta.token_ids]
    assert tokens[:16] == goldens.greedy("seed", "len33")
    return tokens


def test_goldens_and_what_is_told(tmp_path: Path) -> None:
    with cluster(tmp_path, "--stage-layers", "0-1,2") as (client, stages):
        assert [each["layers"] for each in stages.listed] == ["0-1", "2"]
        for prompt, ids in goldens.PROMPTS.items():
            done = client.generate(ids, max_tokens=16, temperature=0, ignore_eos=True)
            assert list(done.token_ids) == goldens.greedy("seed", prompt)
        (worker,) = attention(client)
        assert [(stage.layer_begin, stage.layer_end) for stage in worker.stages] == [(0, 2), (2, 3)]
        assert [stage.address for stage in worker.stages] == [each["address"] for each in stages.listed]


def test_stages_of_several_ranks(tmp_path: Path) -> None:
    """A residual from one group of ranks to the next."""
    with cluster(tmp_path, "--pipeline-stages", "2", "--tensor-parallel", "2") as (client, stages):
        assert [each["layers"] for each in stages.listed] == ["0-1", "2-2"]
        for prompt, ids in goldens.PROMPTS.items():
            done = client.generate(ids, max_tokens=16, temperature=0, ignore_eos=True)
            assert list(done.token_ids) == goldens.greedy("seed", prompt)
        (worker,) = attention(client)
        assert [stage.device for stage in worker.stages] == ["cpu x 2"] * 2


def test_any_stage_is_killed_while_another_pipeline_is_there(tmp_path: Path) -> None:
    with cluster(tmp_path, "--attention", "2", "--pipeline-stages", "3") as (client, stages):
        assert [each["layers"] for each in stages.listed] == ["0-0", "1-1", "2-2"] * 2
        expected = undisturbed(client)
        for number in range(3):
            stream = ask(client)
            tokens = [*next(stream).token_ids]
            (serving,) = [worker for worker in attention(client) if worker.used_pages]
            stage = serving.stages[number]
            assert (stage.layer_begin, stage.layer_end) == (number, number + 1)
            stages.kill(stage.address)
            tokens += [token for delta in stream for token in delta.token_ids]
            assert tokens == expected, "no gap, no repeat, no other token"
            stages.restart(stage.address)
            wait_until_ready(client)


def test_any_stage_is_killed_while_there_is_no_other(tmp_path: Path) -> None:
    """The stream waits for its return."""
    with cluster(tmp_path, "--pipeline-stages", "2") as (client, stages):
        expected = undisturbed(client)
        for stage in stages.listed:
            stream = ask(client)
            tokens = [*next(stream).token_ids]
            stages.kill(stage["address"])
            time.sleep(0.5)
            assert [worker.state for worker in attention(client)] == [WorkerState.SUSPECT]
            stages.restart(stage["address"])
            tokens += [token for delta in stream for token in delta.token_ids]
            assert tokens == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--pipeline-stages", "4"), "pipeline_stages is 4, must be from 1 to 3"),
        (("--stage-layers", "0-1,1-2"), "1-2 must begin with layer 2"),
        (("--stage-layers", "0-1"), "must end with layer 2"),
    ],
)
def test_impossible_settings_are_refused(flags: tuple[str, ...], words: str) -> None:
    with running(*UP, *flags) as up:
        assert up.wait() == 1
        assert words in "\n".join(up.errors)
        assert "Traceback" not in "\n".join(up.errors)
