"""Faults: how they are written, that they are done, and what is said of them."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grokmoe.errors import ConfigError
from loadtest.fault import ClusterState, Fault, check_faults, disturb, effect, parse_fault, read_state
from loadtest.record import Outcome
from loadtest.slo import Slo
from tests.loadtest.records import completed


def test_how_they_are_written() -> None:
    assert parse_fault("kill:expert:1@10s") == Fault("kill", "expert", 1, 10.0)
    assert parse_fault("term:router:0@2.5") == Fault("term", "router", 0, 2.5)
    assert parse_fault("stop:attention:2@5s+0.5s") == Fault("stop", "attention", 2, 5.0, 0.5)


WRONG = "", "kill:expert@5s", "maim:expert:1@5s", "kill:expert:1", "stop:expert:1@5s", "kill:expert:1@5s+2s"


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_fault(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_fault(text)


def state_file(path: Path) -> Path:
    processes = [
        {"role": "router", "index": 0, "pid": 5, "address": "a", "metrics": "127.0.0.1:9"},
        {"role": "expert", "index": 1, "pid": 7, "address": "b", "metrics": ""},
    ]
    path.write_text(json.dumps({"address": "127.0.0.1:1", "processes": processes}))
    return path


def test_a_state_file(tmp_path: Path) -> None:
    state = read_state(state_file(tmp_path / "s"))
    assert state == ClusterState("127.0.0.1:1", ("127.0.0.1:9",), {("router", 0): 5, ("expert", 1): 7})
    check_faults([parse_fault("kill:expert:1@1s")], state)
    with pytest.raises(ConfigError, match="no expert 2"):
        check_faults([parse_fault("kill:expert:2@1s")], state)
    with pytest.raises(ConfigError):
        read_state(tmp_path / "none")


def test_a_process_is_killed_when_it_is_due() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        state = ClusterState("a", (), {("expert", 0): child.pid})
        begin = time.monotonic()
        done = asyncio.run(disturb(parse_fault("kill:expert:0@0.2s"), state, begin))
        assert child.wait(10) == -9
    assert done >= 0.2


def test_a_process_that_is_stopped_goes_on_later() -> None:
    ticking = "import time\nwhile True: print(time.monotonic(), flush=True); time.sleep(0.01)"
    with subprocess.Popen([sys.executable, "-c", ticking], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        stamps = [float(child.stdout.readline())]
        state = ClusterState("a", (), {("expert", 0): child.pid})
        asyncio.run(disturb(parse_fault("stop:expert:0@0s+0.5s"), state, time.monotonic()))
        end = time.monotonic()
        while stamps[-1] < end:
            stamps.append(float(child.stdout.readline()))
        child.kill()
    assert max(later - sooner for sooner, later in itertools.pairwise(stamps)) > 0.4


def tokens(begin: float, end: float, every: float = 0.05) -> list[float]:
    return [begin + every * index for index in range(1, round((end - begin) / every) + 1)]


def test_what_a_fault_did() -> None:
    """Streams of 20 tokens/s; at 5 s all stand still for 2 s; one is lost, one has another text."""
    calm = [completed(0.0, tokens(0.0, 12.0), index=index) for index in range(4)]
    calm.append(completed(12.0, tokens(12.0, 13.0), index=4))
    hit = [completed(0.0, [*tokens(0.0, 5.0), *tokens(7.0, 14.0)], index=index) for index in range(4)]
    hit.append(completed(12.0, tokens(12.0, 13.0), index=4))
    hit[1].digest = "another"
    hit[2].outcome = Outcome.FAILED
    hit[2].end = 5.5
    found = effect(5.0, hit, calm, Slo((("tpot", 0.055),), 0.99))
    assert found["requests_under_way"] == 4
    assert found["requests_lost"] == 1
    assert (found["compared"], found["changed"]) == (4, 1)
    assert found["longest_stall_ms"] == pytest.approx(2050.0)
    assert found["tokens_per_s_dip"] == 0.0
    assert found["recovery_seconds"] == pytest.approx(2.0, abs=0.26)
    assert found["slo_attained_undisturbed"] == 1.0
    assert found["slo_attained"] == pytest.approx(1 / 5)


def test_a_fault_that_nobody_noticed() -> None:
    calm = [completed(0.0, tokens(0.0, 12.0)), completed(11.9, tokens(11.9, 12.9), index=1)]
    found = effect(5.0, calm, calm, Slo(()))
    assert found["recovery_seconds"] == 0.0
    assert found["tokens_per_s_dip"] == pytest.approx(1.0, abs=0.25)
    assert found["changed"] == found["requests_lost"] == 0
