"""`buf curl`, a client that knows nothing of us but what reflection tells."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grokmoe import Client
from tests.cluster.command import running

pytestmark = pytest.mark.cluster

BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")

Curl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running("serve", "--port", "0", "--kv-gib", "0.01") as serve:
        yield serve.wait_ready()
        assert serve.stop() == 0


@pytest.fixture
def curl(address: str, tmp_path: Path) -> Curl:
    if BUF is None:
        pytest.skip("buf is not installed")

    def call(path: str = "", data: Any = None, *flags: str) -> subprocess.CompletedProcess[str]:
        command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *flags]
        if data is not None:
            command += ["--data", json.dumps(data)]
        return subprocess.run(
            [*command, f"http://{address}{path}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
        )

    return call


def messages(told: subprocess.CompletedProcess[str]) -> list[Any]:
    """The JSON documents on standard output, one behind the other."""
    assert told.returncode == 0, told.stderr
    decoder, rest, found = json.JSONDecoder(), told.stdout.strip(), []
    while rest:
        value, end = decoder.raw_decode(rest)
        found.append(value)
        rest = rest[end:].strip()
    return found


def test_methods_are_listed(curl: Curl) -> None:
    told = curl("", None, "--list-methods")
    assert told.returncode == 0, told.stderr
    listed = set(told.stdout.split())
    assert {
        "grokmoe.v1.Generation/Generate",
        "grokmoe.v1.Generation/StreamGenerate",
        "grokmoe.v1.Control/GetStatus",
        "grpc.health.v1.Health/Check",
    } <= listed


def test_the_ecosystems_service_is_listed_where_its_messages_are_installed(curl: Curl) -> None:
    pytest.importorskip("smg_grpc_proto")
    told = curl("", None, "--list-methods")
    assert "vllm.grpc.engine.VllmEngine/Generate" in told.stdout.split(), told.stderr


def test_a_unary_call(curl: Curl, address: str) -> None:
    (model,) = messages(curl("/grokmoe.v1.Generation/GetModel", {}))
    assert model["name"] == "demo_model"
    request = {"text": "KING HENRY.", "sampling": {"temperature": 0}, "stopping": {"maxTokens": 8}}
    (answer,) = messages(curl("/grokmoe.v1.Generation/Generate", request))
    with Client(address) as client:
        assert answer["candidates"][0]["text"] == client.generate("KING HENRY.", max_tokens=8, temperature=0).text


def test_a_streaming_call(curl: Curl) -> None:
    generate = {"text": "KING HENRY.", "sampling": {"temperature": 0}, "stopping": {"maxTokens": 8}}
    (answer,) = messages(curl("/grokmoe.v1.Generation/Generate", generate))
    parts = messages(curl("/grokmoe.v1.Generation/StreamGenerate", {"generate": generate}))
    assert len(parts) > 1
    assert "".join(part.get("textDelta", "") for part in parts) == answer["candidates"][0]["text"]
    assert parts[-1]["finishReason"] == "FINISH_REASON_LENGTH"


def test_health(curl: Curl) -> None:
    for service in ("", "grokmoe.v1.Generation"):
        assert messages(curl("/grpc.health.v1.Health/Check", {"service": service})) == [{"status": "SERVING"}]


def test_an_error_has_its_code_and_details(curl: Curl) -> None:
    told = curl("/grokmoe.v1.Generation/Generate", {"text": "a", "sampling": {"topP": 2}})
    assert told.returncode != 0
    error = json.loads(told.stderr)
    assert error["code"] == "invalid_argument"
    assert error["message"].startswith("sampling.top_p: is 2")
    types = {detail["type"].rpartition("/")[2] for detail in error["details"]}
    assert types == {"google.rpc.ErrorInfo", "google.rpc.BadRequest"}
