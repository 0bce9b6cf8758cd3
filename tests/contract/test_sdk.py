"""What a client installs: the SDK works with the base dependencies and nothing else, and says what it offers."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import grokmoe
from grokmoe import cluster_status, connection, credentials, logprobs, options, results, stream

ROOT = Path(__file__).resolve().parents[2]

DISTRIBUTIONS = {
    "grpcio": {"grpc"},
    "grpcio-health-checking": {"grpc_health"},
    "grpcio-status": {"grpc_status"},
    "protobuf": {"google"},
    # What these need themselves: grpcio-status the messages of google.rpc, grpcio typing_extensions.
    "googleapis-common-protos": {"google"},
    "typing-extensions": {"typing_extensions"},
}
"""What `pip install grokmoe` brings along, and its top-level packages."""

FORBID = """
import sys

ALLOWED = set(sys.argv[1].split(",")) | sys.stdlib_module_names | {"grokmoe", "launcher"}

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Forbid())
exec(sys.argv[2])
"""

USE = """
import asyncio
import grokmoe
with grokmoe.Client("unix:/nowhere", retries=0) as client:
    try:
        client.generate("x", n=2, json_schema={})
    except grokmoe.Unavailable:
        pass
for name in grokmoe.__all__:
    getattr(grokmoe, name)
"""

COMMAND = """
from launcher.__main__ import main
assert main(["generate", "x", "--address", "unix:/nowhere"]) == 1
import launcher.chat
"""


@pytest.mark.parametrize("program", [USE, COMMAND], ids=["sdk", "command"])
def test_a_client_needs_the_base_dependencies_only(program: str) -> None:
    allowed = ",".join(sorted(set().union(*DISTRIBUTIONS.values())))
    command = [sys.executable, "-c", FORBID, allowed, program]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert told.returncode == 0, told.stderr


def test_the_hook_of_that_test_forbids() -> None:
    command = [sys.executable, "-c", FORBID, "grpc", "import torch"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "ModuleNotFoundError: No module named 'torch'" in told.stderr


def test_the_base_dependencies_are_grpc_and_protobuf() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[><=!~;\[ ]", dependency)[0] for dependency in project["dependencies"]}
    assert names == {"grpcio", "grpcio-health-checking", "grpcio-status", "protobuf"}


@pytest.mark.parametrize("module", [cluster_status, connection, credentials, logprobs, options, results, stream])
def test_what_a_caller_holds_is_exported(module: object) -> None:
    """Every class that a public signature or result can mention."""
    inside = {"Connection", "Endpoint", "CallMetadata"}
    public = {
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    assert public - inside <= set(grokmoe.__all__)


def test_the_reference_is_fresh() -> None:
    command = [sys.executable, str(ROOT / "tools" / "make_reference.py"), "--check"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stderr


def test_both_clients_offer_the_same() -> None:
    """Methods, arguments and defaults; a close differs by name only where asynchronous code expects it."""
    for name in {*vars(grokmoe.AsyncClient), *vars(grokmoe.Client)}:
        if name.startswith("_") or name == "timeout":
            continue
        one, other = (inspect.getattr_static(kind, name, None) for kind in (grokmoe.AsyncClient, grokmoe.Client))
        if name == "address":
            continue
        assert one is not None, name
        assert other is not None, name
        assert str(inspect.signature(one).parameters) == str(inspect.signature(other).parameters), name
