"""The gateway in front of servers that come and go: named by a file, as in a cluster by a name."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("smg")
pytest.importorskip("smg_grpc_proto")

from launcher.gateway import GatewaySettings, smg_flags
from launcher.gateway_servers import manifest
from launcher.openai import free_port
from launcher.paths import DEMO_MODEL
from tests.cluster.command import Command, running
from tests.ecosystem.gateway import wait_openai
from tests.ecosystem.test_gateway import complete
from tests.otlp_collector import collecting

SERVE = ("serve", "--kv-gib", "0.01")
PROMPT = "HAMLET.\nTo be"
PATIENCE = 60.0


def test_one_server_needs_no_policy_and_several_do() -> None:
    one = smg_flags(GatewaySettings(server=("a:1",)))
    assert {"--policy=round_robin", "--disable-retries"} <= set(one)
    assert one[one.index("--worker-urls") + 1 :] == ["grpc://a:1"]
    assert not any(word.startswith("--model-path") for word in one)
    several = smg_flags(GatewaySettings(server=("a:1", "b:2"), model="DIR", log_format="json", traces="http://c:4317"))
    assert {"--policy=cache_aware", "--model-path=DIR", "--log-json", "--enable-trace"} <= set(several)
    assert "--otlp-traces-endpoint=c:4317" in several
    assert "--disable-retries" not in several
    assert several[several.index("--worker-urls") + 1 :] == ["grpc://a:1", "grpc://b:2"]
    followed = smg_flags(GatewaySettings(server=("dns:///name:1",)), Path("/f"))
    assert {"--policy=cache_aware", "--discovery-file=/f"} <= set(followed)
    assert "--worker-urls" not in followed


def test_what_the_gateway_reads() -> None:
    told = json.loads(manifest(["10.0.0.1:50051", "[::1]:50051"]))
    assert [worker["url"] for worker in told["workers"]] == ["grpc://10.0.0.1:50051", "grpc://[::1]:50051"]
    assert len({worker["id"] for worker in told["workers"]}) == 2


def test_a_list_that_cannot_be() -> None:
    command = [sys.executable, "-m", "launcher.gateway", "--server", "dns:///nameless"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 2
    assert "must be dns:///name:port" in told.stderr


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Its URL, and the file that has its servers."""
    servers, port = tmp_path / "servers", free_port("127.0.0.1")
    flags = ["--server", f"file:{servers}", "--model", str(DEMO_MODEL), "--port", str(port)]
    flags += ["--metrics-port", str(free_port("127.0.0.1")), "--exit-on-stdin-eof"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher.gateway", *flags], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    yield f"http://127.0.0.1:{port}/v1", servers
    process.communicate(timeout=PATIENCE)


def soon(url: str) -> str:
    """A completion, as soon as there is one."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return complete(url, PROMPT)
        except OSError:
            assert time.monotonic() < deadline, "no server is found"
            time.sleep(0.2)


@pytest.mark.cluster
def test_servers_come_and_go(gateway: tuple[str, Path]) -> None:
    url, servers = gateway
    with running(*SERVE, "--port", "0") as first:
        servers.write_text(first.wait_ready())
        expected = soon(url)
        with running(*SERVE, "--port", "0") as second:
            address = second.wait_ready()
            servers.write_text(address)
            time.sleep(3)
            assert first.stop() == 0
            assert soon(url) == expected
            assert second.stop() == 0
            # At the same address, as a container that was started anew.
            with running(*SERVE, "--port", address.rpartition(":")[2]) as again:
                assert isinstance(again, Command)
                again.wait_ready()
                assert soon(url) == expected
                assert again.stop() == 0


@pytest.mark.cluster
def test_a_trace_goes_from_the_gateway_to_the_router() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc")
    with collecting() as collector:
        flags = ("--port", "0", "--openai", "--openai-port", "0", "--traces", collector.url, "--trace-share", "0")
        with running(*SERVE, *flags) as serve:
            serve.wait_ready()
            complete(wait_openai(serve), PROMPT)
            deadline = time.monotonic() + PATIENCE
            while not collector.named("grpc_execute"):  # it sends its spans when it likes
                assert time.monotonic() < deadline, "the gateway sends no spans"
                time.sleep(0.2)
            assert serve.stop() == 0
        (request,) = collector.named("request")
        (call,) = [span for span in collector.spans if span.span_id == request.parent_id]
        (http,) = [span for span in collector.spans if span.span_id == call.parent_id]
        assert (call.service, http.service) == ("smg", "smg")
        assert {call.trace_id, http.trace_id} == {request.trace_id}
