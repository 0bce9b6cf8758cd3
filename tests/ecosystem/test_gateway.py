"""`--openai` of `grokmoe serve` and `up`: the gateway lives as long as what is behind it, and says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("smg")
pytest.importorskip("smg_grpc_proto")

import launcher.openai
from grokmoe import Client
from grokmoe.errors import ConfigError
from launcher.paths import DEMO_MODEL
from tests.cluster.command import running
from tests.ecosystem.gateway import wait_openai

pytestmark = pytest.mark.cluster

SERVE = ("serve", "--port", "0", "--kv-gib", "0.01", "--openai")
END_TIMEOUT = 30.0


def gateway_of(pid: int) -> int:
    """Process id of the gateway among the children of a process. It changes its name once it runs."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            words = Path(f"/proc/{child}/cmdline").read_text()
            if "launcher.gateway" in words or "smg" in words:
                found.append(int(child))
    (gateway,) = found
    return gateway


def complete(url: str, prompt: str) -> str:
    body = {"model": "demo_model", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["text"]


def listens(url: str) -> bool:
    where = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((where.hostname, where.port)) == 0


def test_up_serves_it_too_and_ends_when_the_gateway_does() -> None:
    flags = ("--experts", "1", "--port", "0", "--kv-gib", "0.01", "--openai", "--openai-port", "0")
    with running("up", *flags) as up:
        address = up.wait_ready()
        url = wait_openai(up)
        with Client(address) as client:
            expected = client.generate("HAMLET.\nTo be", max_tokens=8, temperature=0).text
        assert complete(url, "HAMLET.\nTo be") == expected
        os.kill(gateway_of(up.process.pid), signal.SIGKILL)
        assert up.wait() == 1
        assert any("the OpenAI gateway ended with code -9" in line for line in up.errors)
        assert not any("Traceback" in line for line in up.errors)


def test_the_gateway_ends_with_a_server_that_is_killed() -> None:
    with running(*SERVE, "--openai-port", "0") as serve:
        serve.wait_ready()
        url = wait_openai(serve)
        assert listens(url)
        serve.stop(signal.SIGKILL)
        deadline = time.monotonic() + END_TIMEOUT
        while listens(url):
            assert time.monotonic() < deadline, "the gateway outlived its server"
            time.sleep(0.02)


def test_a_signal_while_the_gateway_starts_ends_both() -> None:
    with running(*SERVE, "--openai-port", "0") as serve:
        serve.wait_ready()
        gateway = gateway_of(serve.process.pid)
        assert serve.stop() == 0
        assert not Path(f"/proc/{gateway}").exists()


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running(*SERVE, "--openai-port", str(port)) as serve:
            assert serve.wait() == 1
            assert any(f"cannot listen on 127.0.0.1:{port}" in line for line in serve.errors)
            assert not any("Traceback" in line or "Warning" in line for line in serve.errors)


def test_a_model_that_the_gateway_cannot_read(tmp_path: Path) -> None:
    shutil.copy(DEMO_MODEL / "config.json", tmp_path)
    with running(*SERVE, "--model", str(tmp_path)) as serve:
        assert serve.wait() == 1
        assert any("tokenizer.json, and there is no such file" in line for line in serve.errors)


def test_without_the_extra_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher.openai.check_can_start(str(DEMO_MODEL))
    monkeypatch.setattr(launcher.openai, "PACKAGES", ("no_such_package",))
    with pytest.raises(ConfigError, match=r"pip install 'grokmoe\[smg\]'"):
        launcher.openai.check_can_start(str(DEMO_MODEL))
