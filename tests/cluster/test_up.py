"""`grokmoe up`: real processes, and what a person who starts them sees."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from grokmoe import Client, WorkerRole
from tests import goldens
from tests.cluster.command import running

pytestmark = pytest.mark.cluster

METRICS = {
    "router": (
        "grokmoe_requests_total",
        "grokmoe_generated_tokens_total",
        "grokmoe_expert_rows_total",
        "grokmoe_kv_pages",
        "grokmoe_step_seconds_count",
        "grokmoe_leg_seconds_count",
        "grokmoe_request_queue_seconds_count",
    ),
    "attention": ("grokmoe_attention_steps_total", "grokmoe_attention_tokens_total", "grokmoe_attention_kv_bytes"),
    "expert": (
        "grokmoe_expert_worker_rows_total",
        "grokmoe_expert_worker_batch_rows_count",
        "grokmoe_expert_worker_queue_seconds_count",
    ),
}
"""Of each role what must have counted something after a few requests."""

UP = ("up", "--model", str(goldens.DIRECTORY), "--dtype", "float32", "--port", "0", "--kv-gib", "0.001")


def is_alive(pid: int) -> bool:
    """Whether a process runs. An orphan that ended may stay a zombie where nobody reaps it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_dead(pids: list[int], timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "processes outlived their parent"
        time.sleep(0.05)


def test_the_split_topology_in_processes(tmp_path: Path) -> None:
    state_file = tmp_path / "state.json"
    with running(*UP, "--experts", "3", "--expert-replicas", "2", "--attention", "2", "--state", str(state_file)) as up:
        address = up.wait_ready()
        state = json.loads(state_file.read_text())
        assert state["address"] == address
        assert [(each["role"], each["index"]) for each in state["processes"]] == [
            ("router", 0),
            ("attention", 0),
            ("attention", 1),
            ("expert", 0),
            ("expert", 1),
            ("expert", 2),
        ]
        ready = [line for line in up.lines if " ready: pid " in line]
        assert len(ready) == 6
        assert up.lines[-1] == f"READY {address}"
        with Client(address) as client:
            for prompt, ids in goldens.PROMPTS.items():
                done = client.generate(ids, max_tokens=16, temperature=0, ignore_eos=True)
                assert list(done.token_ids) == goldens.greedy("seed", prompt)
            status = client.status()
        assert len([worker for worker in status.workers if worker.role is WorkerRole.EXPERT]) == 3
        assert all(len(placed.workers) == 2 for placed in status.placement)
        for process in state["processes"]:
            url = f"http://{process['metrics']}/metrics"
            text = urllib.request.urlopen(url, timeout=10).read().decode()
            counted: Counter[str] = Counter()
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    counted[sample.name] += int(sample.value)
            if (process["role"], process["index"]) != ("attention", 1):  # an idle cluster prefers the first
                missing = [name for name in METRICS[process["role"]] if not counted[name]]
                assert not missing, f"{process['role']} {process['index']}"
        pids = [process["pid"] for process in state["processes"]]
        assert all(map(is_alive, pids))
        assert up.stop() == 0
        wait_dead(pids, 0.0)


def test_a_replica_takes_over(tmp_path: Path) -> None:
    """With every expert held twice, the death of one worker costs no request and changes no token."""
    state_file = tmp_path / "state.json"
    with running(*UP, "--experts", "2", "--expert-replicas", "2", "--state", str(state_file)) as up:
        address = up.wait_ready()
        experts = [each for each in json.loads(state_file.read_text())["processes"] if each["role"] == "expert"]
        with Client(address) as client:
            stream = client.stream(goldens.PROMPTS["len33"], max_tokens=16, temperature=0, ignore_eos=True)
            first = next(stream)
            os.kill(experts[0]["pid"], signal.SIGKILL)
            tokens = [*first.token_ids, *(token for delta in stream for token in delta.token_ids)]
            assert tokens == goldens.greedy("seed", "len33")
            done = client.generate(goldens.PROMPTS["len70"], max_tokens=16, temperature=0, ignore_eos=True)
            assert list(done.token_ids) == goldens.greedy("seed", "len70")
        assert up.stop() == 0
        assert any("expert 0 ended with code -9" in line for line in up.errors)


def test_a_given_placement_is_used(tmp_path: Path) -> None:
    table = {str(expert): [1] if expert == 5 else [0, 1] if expert == 3 else [0] for expert in range(8)}
    (tmp_path / "placement.json").write_text(json.dumps(table))
    with running(*UP, "--experts", "2", "--placement", str(tmp_path / "placement.json")) as up:
        with Client(up.wait_ready()) as client:
            done = client.generate(goldens.PROMPTS["len33"], max_tokens=16, temperature=0, ignore_eos=True)
            assert list(done.token_ids) == goldens.greedy("seed", "len33")
            assert [list(placed.workers) for placed in client.status().placement] == list(table.values())
        assert up.stop() == 0


def test_children_end_with_their_parent(tmp_path: Path) -> None:
    state_file = tmp_path / "state.json"
    with running(*UP, "--experts", "1", "--state", str(state_file)) as up:
        up.wait_ready()
        pids = [process["pid"] for process in json.loads(state_file.read_text())["processes"]]
        up.stop(signal.SIGKILL)
        wait_dead(pids)


def test_a_child_that_cannot_start_is_quoted(tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text((goldens.DIRECTORY / "config.json").read_text())
    (broken / "model.safetensors").write_bytes((goldens.DIRECTORY / "model.safetensors").read_bytes()[:100_000])
    with running("up", "--model", str(broken), "--port", "0") as up:
        assert up.wait() == 1
        said = "\n".join(up.errors)
        assert "ended at start with code 1" in said
        assert "model.safetensors" in said
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--experts", "9"), "9 workers for 8 experts"),
        (("--experts", "2", "--expert-replicas", "3"), "3 replicas"),
        (("--attention", "0"), "attention is 0"),
        (("--port", "99999"), "port is 99999"),
        (("--kv-gib", "-1"), "kv_gib is -1.0"),
        (("--state", "/nowhere/state.json"), "no such folder"),
        (("--placement", "/nowhere.json"), "placement /nowhere.json"),
        (("--model", "/nowhere"), "/nowhere/config.json: no such file"),
    ],
)
def test_impossible_settings_are_refused(flags: tuple[str, ...], words: str) -> None:
    with running(*UP, *flags) as up:
        assert up.wait() == 1
        assert words in "\n".join(up.errors)
        assert "Traceback" not in "\n".join(up.errors)
