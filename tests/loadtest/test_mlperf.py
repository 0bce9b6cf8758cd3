"""examples/mlperf against a real server, where LoadGen is installed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.command import running

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "examples" / "mlperf" / "run.py"


def test_it_compiles() -> None:
    compile(PROGRAM.read_text(), str(PROGRAM), "exec")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    pytest.importorskip("mlperf_loadgen", reason="mlcommons-loadgen is not installed: the project does not need it")
    with running("serve", "--port", "0", "--kv-gib", "0.02") as serve:
        yield serve.wait_ready()


def figure(summary: str, name: str) -> float:
    """A number of LoadGen's summary."""
    match = re.search(rf"(?m)^{re.escape(name)}\s*: ([\d.]+)", summary)
    assert match is not None, summary
    return float(match[1])


def run(address: str, folder: Path, *flags: str) -> tuple[int, str]:
    """Exit code and summary. Limits are far off, so that the machine's speed does not decide."""
    sizes = ["--num-prompts", "64", "--input-len", "8", "--output-len", "4"]
    limits = ["--ttft-ms", "100000", "--tpot-ms", "100000"]
    command = [sys.executable, str(PROGRAM), "--address", address, "--output-dir", str(folder), *sizes, *limits, *flags]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.cluster
def test_the_server_scenario_is_valid_with_as_many_queries_as_early_stopping_asks_for(address, tmp_path) -> None:
    code, told = run(address, tmp_path, "--scenario", "Server", "--rate", "100", "--queries", "459", "--seconds", "1")
    assert "Scenario : Server" in told
    assert "Result is : VALID" in told
    assert code == 0
    assert figure(told, "target_qps") == 100
    # Every answer has four tokens, the first of which is told apart.
    samples, tokens = figure(told, "Completed samples per second"), figure(told, "Completed tokens per second")
    assert tokens == pytest.approx(4 * samples, rel=0.02)
    first, whole = (figure(told, f"50.00 percentile {name} (ns)") for name in ("first token latency", "latency"))
    assert 0 < first < whole
    assert (tmp_path / "mlperf_log_detail.txt").exists()


@pytest.mark.cluster
def test_too_few_queries_are_said_to_prove_nothing(address, tmp_path) -> None:
    code, told = run(address, tmp_path, "--scenario", "Server", "--rate", "100", "--queries", "50", "--seconds", "0.1")
    assert "Result is : INVALID" in told
    assert "Early stopping satisfied: NO" in told
    assert code == 1


@pytest.mark.cluster
def test_the_offline_scenario_is_valid_if_more_is_expected_than_is_done(address, tmp_path) -> None:
    code, told = run(address, tmp_path, "--scenario", "Offline", "--rate", "5000", "--seconds", "0.1")
    assert "Scenario : Offline" in told
    assert "Result is : VALID" in told
    assert code == 0
    samples, tokens = figure(told, "Samples per second"), figure(told, "Tokens per second")
    assert tokens == pytest.approx(4 * samples, rel=0.01)


@pytest.mark.cluster
def test_requests_that_fail_make_the_run_fail(address, tmp_path) -> None:
    """Prompts longer than the model's context: LoadGen would call the empty answers VALID."""
    sizes = ["--input-len", "4000", "--queries", "20", "--seconds", "0.1"]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--address", address, "--output-dir", str(tmp_path), "--rate", "100", *sizes],
        capture_output=True, text=True, timeout=240, check=False, env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert "failed: " in done.stderr
