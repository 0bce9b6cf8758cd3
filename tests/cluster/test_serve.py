"""`grokmoe serve`, `generate`, `checkpoint` and `demo`: what a person types, with the embedded model."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from grokmoe import Client, FinishReason
from launcher.paths import DEMO_MODEL
from tests.cluster.command import running

pytestmark = pytest.mark.cluster


def grokmoe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_serve_without_a_model_serves_the_demo_model() -> None:
    with running("serve", "--port", "0", "--kv-gib", "0.01") as serve:
        address = serve.wait_ready()
        with Client(address) as client:
            model = client.model()
            assert model.name == "demo_model"
            assert model.has_tokenizer
            done = client.generate("KING HENRY.", max_tokens=12, temperature=0)
            assert done.usage.completion_tokens <= 12
            assert done.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
            streamed = "".join(delta.text for delta in client.stream("KING HENRY.", max_tokens=12, temperature=0))
            assert streamed == done.text
            drawn = [client.generate("The ", max_tokens=8, temperature=1, seed=7).token_ids for _ in range(2)]
            assert drawn[0] == drawn[1]
        told = grokmoe("generate", "ROMEO.\nBut soft", "--address", address, "--max-tokens", "8")
        assert told.returncode == 0, told.stderr
        assert told.stdout.startswith("ROMEO.\nBut soft")
        assert "tokens/s" in told.stderr
        assert serve.stop(signal.SIGINT) == 0


def test_generate_without_a_server_says_so() -> None:
    told = grokmoe("generate", "hello", "--address", "127.0.0.1:9")
    assert told.returncode == 1
    assert "error" in told.stderr
    assert "Traceback" not in told.stderr


def test_inspect_sums_up_the_demo_model() -> None:
    told = grokmoe("checkpoint", "inspect", str(DEMO_MODEL))
    assert told.returncode == 0, told.stderr
    assert "8 experts" in told.stdout
    assert "config hash" in told.stdout


@pytest.mark.parametrize("role", ["router", "attention_worker", "expert_worker"])
def test_every_role_explains_itself(role: str) -> None:
    told = subprocess.run(
        [sys.executable, "-m", role, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "READY" in told.stdout
    assert "example" in told.stdout
    missing = subprocess.run([sys.executable, "-m", role], capture_output=True, text=True, timeout=60, check=False)
    assert missing.returncode == 1
    assert "error:" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_the_demo_runs_to_its_end() -> None:
    told = grokmoe("demo", "--experts", "2", "--max-tokens", "12")
    assert told.returncode == 0, told.stderr
    for words in ("TTFT ms", "rows per expert", "latency of each leg", "all processes ended cleanly"):
        assert words in told.stdout, told.stdout
