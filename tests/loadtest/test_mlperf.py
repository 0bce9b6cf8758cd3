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


def run(address: str, folder: Path, *flags: str) -> str:
    """The summary. Limits are far off, so that the machine's speed does not decide."""
    sizes = ["--num-prompts", "12", "--seconds", "1", "--input-len", "8", "--output-len", "4"]
    limits = ["--ttft-ms", "100000", "--tpot-ms", "100000"]
    command = [sys.executable, str(PROGRAM), "--address", address, "--output-dir", str(folder), *sizes, *limits, *flags]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.cluster
def test_the_server_scenario(address, tmp_path) -> None:
    told = run(address, tmp_path, "--scenario", "Server", "--rate", "20")
    assert "Scenario : Server" in told
    assert figure(told, "target_qps") == 20
    # Every answer has four tokens, the first of which is told apart.
    assert figure(told, "Completed tokens per second") > 0
    assert figure(told, "99.00 percentile first token latency (ns)") > 0
    assert (tmp_path / "mlperf_log_detail.txt").exists()


@pytest.mark.cluster
def test_the_offline_scenario(address, tmp_path) -> None:
    told = run(address, tmp_path, "--scenario", "Offline", "--rate", "2")
    assert "Scenario : Offline" in told
    samples, tokens = figure(told, "Samples per second"), figure(told, "Tokens per second")
    assert tokens == pytest.approx(4 * samples, rel=0.01)
