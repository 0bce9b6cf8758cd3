"""`python -m expert_worker` as a process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from grokmoe import tensors
from grokmoe.channel import open_channel
from grokmoe.checkpoint import Checkpoint
from grokmoe.model_config import TINY
from grokmoe.settings import child_environment
from grokmoe.v1 import expert_pb2, tensor_pb2
from tests.expert_worker.small_model import assert_near, draw, twin, until, write

pytestmark = pytest.mark.cluster

NAME = "grokmoe.v1.Expert"
COMMAND = (sys.executable, "-m", "expert_worker")
ROOT = Path(__file__).parents[2]
ENVIRONMENT = child_environment(PYTHONPATH=str(ROOT))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


@contextlib.asynccontextmanager
async def worker(*flags: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, str]]]:
    """A worker process that is ready, and what it said on standard output until then."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *flags, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    said: dict[str, str] = {}
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            while "READY" not in said:
                word, _, value = (await process.stdout.readline()).decode().strip().partition(" ")
                assert word, "the worker ended before it was ready"
                said[word] = value
        yield process, said
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def test_serve_and_stop(directory: Path) -> None:
    async def scenario() -> None:
        flags = ("--model", str(directory), "--experts", "0-3@0+5@all", "--threads", "1")
        async with worker(*flags) as (process, said), open_channel(said["READY"]) as channel:
            assert said.keys() == {"METRICS", "READY"}
            health = health_pb2_grpc.HealthStub(channel)
            status = await health.Check(health_pb2.HealthCheckRequest(service=NAME), timeout=5)
            assert status.status == health_pb2.HealthCheckResponse.SERVING

            describe = channel.unary_unary(
                f"/{NAME}/Describe", response_deserializer=expert_pb2.ExpertDescribeResponse.FromString
            )
            reply = await describe(b"", timeout=5)
            assert reply.dtype == tensor_pb2.DATA_TYPE_BFLOAT16
            held = [(each.expert, each.layer_begin, each.layer_end) for each in reply.experts]
            assert held == [(0, 0, 1), (1, 0, 1), (2, 0, 1), (3, 0, 1), (5, 0, 2)]

            stream = channel.stream_stream(f"/{NAME}/Forward")()
            rows_ND = draw(3, dtype=torch.bfloat16)
            request = expert_pb2.ForwardRequest(request_id=1, layer=1, expert_ids=[5], counts=[3])
            await stream.write(tensors.encode(request, rows_ND))
            async with asyncio.timeout(10):
                answer, out_ND = tensors.decode(expert_pb2.ForwardResponse, await stream.read())
            assert not answer.HasField("failure"), answer.failure
            assert out_ND is not None
            assert_near(out_ND, twin(directory, 1, [5], [3], rows_ND))

            # The open stream must not hold the process up.
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(4):
                assert await process.wait() == 0

    asyncio.run(scenario())


def test_a_spare_that_is_loaded_and_unloaded(tmp_path: Path) -> None:
    """It says that it holds nothing; memory comes with experts and goes with them."""
    config = dataclasses.replace(
        TINY,
        hidden_size=512,
        intermediate_size=2048,
        num_heads=8,
        head_dim=64,
        num_experts=4,
        attention_logit_scale=0.125,
    )
    directory = write(tmp_path / "model", config, torch.bfloat16)
    size = config.num_experts * config.num_layers * 3 * 512 * 2048 * 2

    async def scenario() -> None:
        flags = ("--model", str(directory), "--experts", "none", "--capacity", "8", "--threads", "1")
        async with worker(*flags) as (process, said), open_channel(said["READY"]) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            status = await health.Check(health_pb2.HealthCheckRequest(service=NAME), timeout=5)
            assert status.status == health_pb2.HealthCheckResponse.SERVING

            def resident() -> int:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

            def call(method: str) -> Any:
                ranges = [expert_pb2.ExpertRange(expert=expert, layer_end=2) for expert in range(4)]
                request = getattr(expert_pb2, f"Expert{method}Request")(config_hash=content_hash, experts=ranges)
                reply = getattr(expert_pb2, f"Expert{method}Response")
                stub: Any = channel.unary_unary(f"/{NAME}/{method}", response_deserializer=reply.FromString)
                return stub(request.SerializeToString(), timeout=30)

            empty = resident()
            loaded = await call("Load")
            assert (loaded.loaded_bytes, loaded.revision) == (size, 2)
            full = resident()
            assert full - empty > 0.8 * size
            assert (await call("Unload")).revision == 3
            await until(lambda: full - resident() > 0.8 * size, timeout=30)

            process.send_signal(signal.SIGTERM)
            _, told = await process.communicate()
            assert b"holds experts none: 0 of 8 it can hold" in told
            assert process.returncode == 0

    with Checkpoint.open(directory) as checkpoint:
        content_hash = checkpoint.config.content_hash
    asyncio.run(scenario())


SLOW_LOADING = """
import sys, time
from expert_worker import weights, __main__
def load(experts, checkpoint, is_stopping):
    while not is_stopping():
        time.sleep(0.01)
    raise weights.Cancelled("stopped")
weights.load = load
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_while_it_loads(directory: Path, tmp_path: Path) -> None:
    """Alive, not ready, and willing to stop."""

    async def scenario() -> None:
        address = f"unix:{tmp_path}/socket"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SLOW_LOADING, "--model", str(directory), "--listen", address,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
        )  # fmt: skip
        try:
            async with open_channel(address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                alive = await health.Check(health_pb2.HealthCheckRequest(), timeout=60, wait_for_ready=True)
                assert alive.status == health_pb2.HealthCheckResponse.SERVING
                ready = await health.Check(health_pb2.HealthCheckRequest(service=NAME), timeout=5)
                assert ready.status == health_pb2.HealthCheckResponse.NOT_SERVING
                with pytest.raises(grpc.RpcError) as raised:
                    await channel.unary_unary(f"/{NAME}/Describe")(b"", timeout=5)
                assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(4):
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
            said, _ = await process.communicate()
        assert b"READY" not in said

    asyncio.run(scenario())


def test_ends_with_its_parent(directory: Path) -> None:
    async def scenario() -> None:
        async with worker("--model", str(directory), "--exit-on-stdin-eof", "--metrics-port", "-1") as (process, said):
            assert said.keys() == {"READY"}
            assert process.stdin is not None
            process.stdin.close()
            async with asyncio.timeout(4):
                assert await process.wait() == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "{none}"], ["config.json", "no such file"]),
        (["--model", "{model}", "--experts", "8"], ["experts 0 to 7"]),
        (["--model", "{model}", "--experts", "0-2", "--capacity", "5"], ["names 6", "capacity is 5"]),
    ],
    ids=["no model", "no such expert", "no room"],
)
def test_what_cannot_start_says_why(directory: Path, tmp_path: Path, flags: list[str], words: list[str]) -> None:
    flags = [flag.format(model=directory, none=tmp_path) for flag in flags]
    done = subprocess.run([*COMMAND, *flags], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("expert_worker: error: ")
    for word in words:
        assert word in last
    assert "Traceback" not in done.stderr
