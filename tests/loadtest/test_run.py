"""Whole runs: load processes, a server, the folder that is left."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from grokmoe.errors import ConfigError, GrokmoeError, InvalidRequest
from launcher.loadtest import LoadtestSettings, loadtest
from loadtest.command import INVALID, OK, run_load
from loadtest.record import Outcome, read_records
from loadtest.settings import LoadSettings
from tests.loadtest import echo
from tests.loadtest.echo import Echo
from tests.router.served import service

FAST = {"num_warmups": 2, "progress": False, "ready_check_timeout_sec": 30.0, "max_lag_ms": 1000.0}


async def run(address: str, path: Path, **changes) -> tuple[int, dict]:
    settings = LoadSettings(**{**FAST, "output_dir": str(path), **changes})
    code = await run_load(settings, address, {}, Console(file=io.StringIO()))
    return code, json.loads((path / "result.json").read_text())


def test_a_run_against_a_server_that_computes(tmp_path: Path) -> None:
    """Two processes, ids and lengths as drawn; every token arrives, the server's own times too."""

    async def main() -> tuple[int, dict]:
        async with service() as served:
            changes = {"request_rate": 40.0, "num_prompts": 24, "input_len": "uniform:4:12", "output_len": "5"}
            return await run(served.address, tmp_path, processes=2, window="0,1", **changes)

    code, result = asyncio.run(main())
    assert code == OK
    records = read_records(tmp_path / "requests.jsonl")
    assert [record.index for record in records] == list(range(24))
    assert {record.outcome for record in records} == {Outcome.COMPLETED}
    assert {record.output_len for record in records} == {5}
    assert {record.input_len for record in records} <= set(range(4, 13))
    assert all(record.sent <= record.arrivals[0] <= record.end for record in records)
    assert (result["completed"], result["total_output_tokens"]) == (24, 120)
    assert result["median_server_queue_ms"] >= 0
    assert result["model_id"] == "tiny"
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "requests.jsonl", "report.html", "report.md"}


def test_the_same_seed_sends_the_same_and_gets_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        async with service() as served:
            for name, seed in (("a", 1), ("b", 1), ("c", 2)):
                changes = {"request_rate": 60.0, "num_prompts": 10, "input_len": "6", "output_len": "6", "seed": seed}
                await run(served.address, tmp_path / name, num_warmups=0, **{k: v for k, v in changes.items()})

    asyncio.run(main())
    a, b, c = (read_records(tmp_path / name / "requests.jsonl") for name in "abc")
    assert [(each.scheduled, each.digest) for each in a] == [(each.scheduled, each.digest) for each in b]
    assert [each.scheduled for each in a] != [each.scheduled for each in c]
    assert [each.digest for each in a] != [each.digest for each in c]


def test_a_run_whose_harness_is_late_is_invalid(tmp_path: Path) -> None:
    async def main() -> tuple[int, dict]:
        async with echo.serving(Echo()) as address:
            changes = {"request_rate": 100.0, "num_prompts": 20, "input_len": "4", "output_len": "2"}
            return await run(address, tmp_path, **changes, max_lag_ms=0.0)

    code, result = asyncio.run(main())
    assert code == INVALID
    assert not result["valid"]
    assert "late" in result["invalid_because"]
    assert "INVALID" in (tmp_path / "report.md").read_text()


def test_a_closed_loop_over_two_processes(tmp_path: Path) -> None:
    async def main() -> tuple[int, dict]:
        async with echo.serving(Echo(first=0.05)) as address:
            changes = {"max_concurrency": 5, "num_prompts": 40, "input_len": "4", "output_len": "1"}
            return await run(address, tmp_path, processes=2, **changes)

    code, result = asyncio.run(main())
    assert (code, result["completed"], result["max_concurrent_requests"]) == (OK, 40, 5)
    assert result["request_throughput"] < 5 / 0.05


def test_the_sweep_finds_the_capacity_of_a_server(tmp_path: Path) -> None:
    """Two slots of 50 ms serve 40 requests/s; the objective of 400 ms for half of the requests leaves no other edge."""

    async def main() -> tuple[int, dict]:
        async with echo.serving(Echo(first=0.05, slots=2)) as address:
            changes = {"sweep_seconds": 2.5, "goodput": ("ttft:400",), "slo_share": 0.5, "arrivals": "constant"}
            changes |= {"input_len": "4", "output_len": "1", "sweep_tolerance": 0.5, "sweep_start": 10.0}
            return await run(address, tmp_path, sweep=True, **changes)

    _, result = asyncio.run(main())
    assert 15 <= result["sweep"]["held"] <= 45
    assert 30 <= result["sweep"]["failed"] <= 80
    assert result["request_rate"] == result["sweep"]["held"]
    assert "offered/s" in (tmp_path / "report.md").read_text()


def test_prompts_of_a_trace_are_sent_at_its_times(tmp_path: Path) -> None:
    lines = [{"timestamp": 100 * index, "input_length": 8, "output_length": 2} for index in range(8)]
    (tmp_path / "trace").write_text("\n".join(map(json.dumps, lines)))

    async def main() -> tuple[int, dict]:
        async with echo.serving(Echo()) as address:
            path = str(tmp_path / "trace")
            return await run(address, tmp_path / "r", dataset_name="timed_trace", dataset_path=path, trace_speed=2.0)

    asyncio.run(main())
    records = read_records(tmp_path / "r" / "requests.jsonl")
    assert [record.scheduled for record in records] == pytest.approx([0.05 * index for index in range(8)])
    assert all(record.sent >= record.scheduled for record in records)


def test_a_load_process_that_cannot_begin_is_an_error(tmp_path: Path) -> None:
    async def main() -> None:
        await run("127.0.0.1:1", tmp_path, ready_check_timeout_sec=0.2)

    with pytest.raises(GrokmoeError):
        asyncio.run(main())


def test_errors_of_the_server_are_in_the_result(tmp_path: Path) -> None:
    async def main() -> tuple[int, dict]:
        server = Echo(error_of=lambda name: InvalidRequest("prompt", "no") if name.endswith("3") else None)
        async with echo.serving(server) as address:
            changes = {"request_rate": 100.0, "num_prompts": 20, "input_len": "4", "output_len": "2"}
            return await run(address, tmp_path, window="0,1", **changes)

    _, result = asyncio.run(main())
    assert result["failed"] == 2
    assert result["errors_by_code"] == {"INVALID_ARGUMENT": 2}
    assert result["errors_by_reason"] == {"INVALID_FIELD": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_prompts": 0},
        {"max_concurrency": 0},
        {"dataset_name": "sharegpt"},
        {"dataset_path": "x"},
        {"ramp_up_strategy": "linear"},
        {"request_rate": 5.0, "sweep": True},
        {"fault": ("kill:expert:1@1s",), "sweep": True},
        {"metadata": ("x",)},
        {"window": "0.5"},
        {"metric_percentiles": "50,101"},
    ],
)
def test_settings_that_cannot_be(changes) -> None:
    with pytest.raises(ConfigError):
        LoadSettings(**changes)


def test_a_fault_needs_to_know_whose_process(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="state"):
        asyncio.run(run("127.0.0.1:1", tmp_path, fault=("kill:expert:1@1s",)))


@pytest.mark.cluster
def test_a_worker_is_killed_in_the_middle_of_a_run(tmp_path: Path) -> None:
    """The demo's cluster has two holders of each expert: nothing is lost, the report says what it cost."""
    command = ["--demo", "--request-rate", "4", "--num-prompts", "16", "--input-len", "16", "--output-len", "24"]
    command += ["--fault", "kill:expert:1@2s", "--output-dir", str(tmp_path), "--window", "0,1", "--max-lag-ms", "2000"]
    assert loadtest([*command, "--no-progress"]) == OK
    result = json.loads((tmp_path / "result.json").read_text())
    (fault,) = result["faults"]
    assert fault["fault"] == "kill:expert:1@2s"
    assert 2.0 <= fault["at"] < 4.0
    assert (fault["requests_lost"], fault["compared"], result["completed"]) == (0, 16, 16)
    experts = result["server_metrics"]["experts"]
    assert set(experts["rows"]) == {str(expert) for expert in range(8)}
    assert sum(map(sum, experts["rows"].values())) > 0
    assert "kill:expert:1@2s" in (tmp_path / "report.html").read_text()


def test_the_command_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert loadtest(["--explain"]) == 0
    assert "request_goodput" in capsys.readouterr().out


def test_lists_are_written_as_vllm_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    async def fake(settings, address, options, console) -> int:
        seen.append((settings, address))
        return 0

    monkeypatch.setattr("launcher.loadtest.run_load", fake)
    assert loadtest(["--goodput", "ttft:500", "tpot:50", "--request-rate", "inf"]) == 0
    assert loadtest(["--goodput", "ttft:500,tpot:50", "--address", "h:1"]) == 0
    assert [settings.goodput for settings, _ in seen] == [("ttft:500", "tpot:50")] * 2
    assert [address for _, address in seen] == ["127.0.0.1:50051", "h:1"]
    assert isinstance(seen[0][0], LoadtestSettings)
